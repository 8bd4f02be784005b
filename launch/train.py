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

from .support.any_run import bring_up, train_in
from .support.peers import Peers
from .support.resumed import resumed_tag
from .support.run import Run
from .support.script import run_script
from .support.settings import Settings, parser, read_settings
from .support.start import end_process

__all__ = ["main", "parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return run_script(arguments, read_settings, _train)


def _train(settings: Settings, peers: Peers) -> None:
    """Everything between a command line and result.json. Collective."""
    peers.check_alike(settings.facts())
    text = peers.patiently(lambda: settings.check_inputs(comes_back=peers.joins))
    peers.check_alike({"text": text})
    resumes = settings.flags.resume and not peers.joins
    tag = resumed_tag(peers, settings.folder) if resumes else None
    world_config = bring_up(settings, peers)
    train_in(settings, peers, lambda: Run(settings, peers, world_config, text, tag))


if __name__ == "__main__":
    end_process(main())
