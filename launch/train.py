"""Train a text generator over pruned gradients or updates.

    deepspeed --num_accelerators 2 launch/train.py --config ds_configs/laptop.json --out runs/first
    mpirun -np 2 python launch/train.py --config ds_configs/laptop.json --out runs/first
    python launch/train.py --config ds_configs/laptop.json --out runs/first

Everything that is no flag is a key of the DeepSpeed configuration. The folder --out gets the model
(<out>/model, a plain transformers folder), the resolved configuration, a log of every step, the
checkpoints, and result.json.
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
from ds_gradprune.deepspeed.build_locks import stale_locks, warning
from ds_gradprune.errors import GradPruneError
from launch.support.peers import TELL_LIMIT_S, AgreedFault, Peers, within
from launch.support.place import Place, export_place, find_place, share_cores
from launch.support.rendezvous import AbsentRanks
from launch.support.run import Run, say
from launch.support.settings import Settings, read_settings
from launch.support.start import (
    check_ds_config,
    choose_accelerator,
    connect,
    end_process,
    skip_shm_op,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    place, peers = Place(), None
    try:
        place = find_place(os.environ)
        export_place(place, os.environ)
        share_cores(place, os.environ)
        choose_accelerator()
        settings, timeout_s = _read(arguments)
        peers = connect(place, timeout_s)
        with peers.during("starting"):
            _train(peers.together(settings), peers)
    except GradPruneError as exc:
        if isinstance(exc, (AgreedFault, AbsentRanks)):
            tells = place.rank == exc.rank
        else:
            tells = peers.tells() if peers is not None else place.rank == 0
        if tells:
            say(f"error: {exc}")
        if peers is not None:  # a launcher ends all ranks when one ends: first let it be said
            within(TELL_LIMIT_S, lambda: peers.gather(None))
        return 2
    except KeyboardInterrupt:
        if peers is None or peers.rank == 0:
            say("Interrupted; nothing new was saved.")
        return 130
    return 0


def _read(arguments: Sequence[str] | None) -> tuple[Callable[[], Settings], float]:
    """The settings, or their fault when they are asked for; and how long ranks wait for others.

    So a fault is told once, when all ranks are there.
    """
    try:
        settings = read_settings(arguments)
    except GradPruneError as exc:
        fault = exc

        def fail() -> Settings:
            raise fault

        return fail, GradientPruningConfig().timeout_s
    return lambda: settings, settings.block.timeout_s


def _train(settings: Settings, peers: Peers) -> None:
    """Everything between a command line and result.json. Collective."""
    peers.check_alike(settings.facts())
    text = peers.patiently(settings.check_inputs)
    resumed = settings.folder.newest() if settings.flags.resume else None
    peers.check_alike({"text": text, "checkpoint": resumed})
    if peers.place.local_rank == 0 and (locks := stale_locks()):
        say(warning(locks))
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    skip_shm_op()
    deepspeed.init_distributed()
    world_config = peers.together(lambda: check_ds_config(settings.ds_config))
    try:
        try:
            run = Run(settings, peers, world_config, text)
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
