"""Fine-tune a language model with the Hugging Face Trainer over pruned updates or gradients.

    deepspeed --hostfile hosts launch/finetune.py --model my-model --data qa.jsonl --out runs/tuned
    deepspeed --num_accelerators 2 launch/finetune.py --model model.gguf --data text.txt --lora

The folder --out gets the model (<out>/model, a plain transformers folder; with --lora the adapter
as well), the resolved configuration, a log of every step, the checkpoints, and result.json.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    # The root instead of this folder: launch, textgen and ds_gradprune are found there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import GradPruneError
from launch.support.peers import TELL_LIMIT_S, AgreedFault, Peers, within
from launch.support.place import Place, export_place, find_place, share_cores
from launch.support.rendezvous import AbsentRanks
from launch.support.run import say
from launch.support.start import (
    check_ds_config,
    choose_accelerator,
    connect,
    end_process,
    skip_shm_op,
)
from launch.support.tuning_settings import TuningSettings, read_tuning_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    place, peers = Place(), None
    try:
        place = find_place(os.environ)
        export_place(place, os.environ)
        # DeepSpeed's launcher does not set it, and accelerate 1.15.0 then writes 1 into it.
        os.environ["LOCAL_WORLD_SIZE"] = str(place.local_world_size)
        share_cores(place, os.environ)
        choose_accelerator()
        settings, timeout_s = _read(arguments)
        peers = connect(place, timeout_s)
        with peers.during("starting"):
            _tune(peers.together(settings), peers)
    except GradPruneError as exc:
        _tell(exc, place, peers)
        return 2
    except KeyboardInterrupt:
        if peers is None or peers.rank == 0:
            say("Interrupted; nothing new was saved.")
        return 130
    return 0


def _tell(exc: GradPruneError, place: Place, peers: Peers | None) -> None:
    """Say a failure once, on the rank that knows best."""
    if isinstance(exc, (AgreedFault, AbsentRanks)):
        tells = place.rank == exc.rank
    else:
        tells = peers.tells() if peers is not None else place.rank == 0
    if tells:
        say(f"error: {exc}")
    if peers is not None:  # a launcher ends all ranks when one ends: first let it be said
        found = peers
        within(TELL_LIMIT_S, lambda: found.gather(None))


def _read(arguments: Sequence[str] | None) -> tuple[Callable[[], TuningSettings], float]:
    """The settings, or their fault when they are asked for; and how long ranks wait for others.

    So a fault is told once, when all ranks are there.
    """
    try:
        settings = read_tuning_settings(arguments)
    except GradPruneError as exc:
        fault = exc

        def fail() -> TuningSettings:
            raise fault

        return fail, GradientPruningConfig().timeout_s
    return lambda: settings, settings.block.timeout_s


def _tune(settings: TuningSettings, peers: Peers) -> None:
    """Everything between a command line and result.json. Collective."""
    peers.check_alike(settings.facts())
    prompts = peers.together(settings.check_inputs)
    peers.check_alike({"prompts": prompts})
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    skip_shm_op()
    deepspeed.init_distributed()
    peers.together(lambda: check_ds_config(settings.ds_config))
    from launch.support.tuning_run import TuningRun
    from textgen.model import quiet_transformers

    quiet_transformers()
    try:
        try:
            run = TuningRun(settings, peers, prompts)
        except BaseException:
            settings.folder.discard()
            raise
        with peers.during("training"):
            run.train()
    finally:
        settings.folder.release()


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    end_process(main())
