"""Train a text generator over pruned gradients or updates.

    deepspeed --num_accelerators 2 launch/train.py --config ds_configs/laptop.json --out runs/first
    mpirun -np 2 python launch/train.py --config ds_configs/laptop.json --out runs/first
    python launch/train.py --config ds_configs/laptop.json --out runs/first

Everything that is no flag is a key of the DeepSpeed configuration. The folder --out gets the model
(<out>/model, a plain transformers folder), the resolved configuration, a log of every step, the
checkpoints, and result.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # The root instead of this folder: launch, textgen and ds_gradprune are found there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "launch"

from .support.peers import Peers
from .support.run import Run
from .support.script import run_script, warn_of_locks
from .support.settings import Settings, parser, read_settings
from .support.start import check_ds_config, end_process, quiet_deepspeed, skip_shm_op

__all__ = ["main", "parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return run_script(arguments, read_settings, _train)


def _train(settings: Settings, peers: Peers) -> None:
    """Everything between a command line and result.json. Collective."""
    peers.check_alike(settings.facts())
    text = peers.patiently(settings.check_inputs)
    resumed = settings.folder.newest() if settings.flags.resume else None
    peers.check_alike({"text": text, "checkpoint": resumed})
    warn_of_locks(peers.place)
    import deepspeed

    quiet_deepspeed()
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


if __name__ == "__main__":
    end_process(main())
