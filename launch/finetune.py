"""Fine-tune a language model with the Hugging Face Trainer over pruned updates or gradients.

    deepspeed --hostfile hosts launch/finetune.py --model my-model --data qa.jsonl --out runs/tuned
    deepspeed --num_accelerators 2 launch/finetune.py --model model.gguf --data text.txt --lora

The folder --out gets the model (<out>/model, a plain transformers folder; with --lora the adapter
as well), the resolved configuration, a log of every step, the checkpoints, and result.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # The root instead of this folder: launch, textgen and ds_gradprune are found there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "launch"

from ds_gradprune.errors import UnsupportedError

from .support.any_run import bring_up, train_in
from .support.peers import Peers
from .support.script import run_script
from .support.start import end_process
from .support.tuning_settings import TuningSettings, parser, read_tuning_settings

__all__ = ["main", "parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    return run_script(arguments, read_tuning_settings, _tune)


def _tune(settings: TuningSettings, peers: Peers) -> None:
    """Everything between a command line and result.json. Collective."""
    # DeepSpeed's launcher does not set it, and accelerate 1.15.0 then writes 1 into it.
    os.environ["LOCAL_WORLD_SIZE"] = str(peers.place.local_world_size)
    if peers.joins:
        raise UnsupportedError(
            "launch/finetune.py must be started on all ranks at once: its Trainer waits for all of "
            "them, so none can come back. Start all again with --resume."
        )
    peers.check_alike(settings.facts())
    prompts = peers.together(settings.check_inputs)
    peers.check_alike({"prompts": prompts})
    bring_up(settings, peers)
    from textgen.model import quiet_transformers

    from .support.tuning_run import TuningRun

    quiet_transformers()
    train_in(settings, peers, lambda: TuningRun(settings, peers, prompts))


if __name__ == "__main__":
    end_process(main())
