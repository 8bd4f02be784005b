"""What ties a Hugging Face Trainer to the engine that it drives. Imports no transformers itself."""

from __future__ import annotations

import gc
import sys
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_gradprune.deepspeed.agree import Facts, check_ranks
from ds_gradprune.deepspeed.handle import Handle
from ds_gradprune.deepspeed.rotation import rotate
from ds_gradprune.errors import UnsupportedError


def engine_of(model: Any, optimizer: Any = None) -> Any:
    """The engine around a model, which callbacks of the Trainer are not told. Local.

    Args:
        model: what the engine was made of.
        optimizer: what its optimizer is or is wrapped in; None: any.

    Returns:
        The engine; None if there is none.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    for found in gc.get_objects():
        # Not isinstance: it asks proxies, which may be dead, for their class.
        is_engine = issubclass(type(found), DeepSpeedEngine)
        if is_engine and found.__dict__.get("_modules", {}).get("module") is model:
            if inner is None or found.optimizer is inner:
                return found
    return None


_COMPARED = (
    "data_seed",
    "dataloader_drop_last",
    "eval_on_start",
    "eval_steps",
    "eval_strategy",
    "learning_rate",
    "load_best_model_at_end",
    "lr_scheduler_type",
    "num_train_epochs",
    "save_steps",
    "save_strategy",
    "seed",
    "warmup_steps",
)
"""What a Trainer's ranks must have been given alike: else one waits where another does not come."""


def compare_trainers(handle: Any, args: Any, max_steps: int, num_examples: int | None) -> None:
    """Do all ranks train for as long, on as much, and stop to save and evaluate alike?

    Args:
        handle: `engine.gradprune`.
        args: of the Trainer.
        max_steps: optimizer steps of the run.
        num_examples: of the training data; None: it does not say.

    Raises:
        RankMismatchError: names what differs, on all ranks alike.

    Collective: all ranks.
    """
    if not isinstance(handle, Handle):
        return
    values = {f"TrainingArguments.{n}": str(getattr(args, n, None)) for n in _COMPARED}
    values |= {"steps of the Trainer": str(max_steps), "training examples": str(num_examples)}
    check_ranks(handle.seat.transport, Facts(values))


def refuse_miscounted(ranks: int) -> None:
    """Accelerate, where it drives DeepSpeed, must count the ranks that train. Local.

    accelerate 1.15.0 counts one process where DeepSpeed runs on CPUs and nobody said so.

    Args:
        ranks: of the engine to come.

    Raises:
        UnsupportedError: all ranks would read the same data.
    """
    states = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    found: Any = getattr(states, "_shared_state", {})
    if str(getattr(found.get("distributed_type"), "value", "")) != "DEEPSPEED":
        return
    if found.get("num_processes", ranks) != ranks:
        raise UnsupportedError(
            f"accelerate counts {found['num_processes']} processes where {ranks} ranks train: all "
            "would read the same data. On CPUs call accelerate.PartialState(cpu=True) before "
            "Accelerator(), or pass use_cpu=True to TrainingArguments."
        )


def rotate_for(handle: Any, args: Any) -> list[str]:
    """Delete our files in checkpoints that the Trainer has deleted on rank 0's host.

    Args:
        handle: `engine.gradprune`.
        args: of the Trainer. Without `save_total_limit` the Trainer deletes nothing, nor do we.

    Returns:
        Names of the folders that were deleted on this host.

    Collective: all ranks.
    """
    if not isinstance(handle, Handle) or not args.save_total_limit:
        return []
    return rotate(args.output_dir, handle.seat)


def join_trainers() -> None:
    """Every Trainer that is made from now on rotates our files, too. Local.

    For code that calls `register()` and nothing else. Where transformers' Trainer has not been
    imported yet, nothing happens; a second call does nothing.
    """
    trainer = sys.modules.get("transformers.trainer")
    if trainer is None:
        return
    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    if not any(callback.__name__ == _NAME for callback in callbacks):
        callbacks.append(_rotating(trainer.TrainerCallback))


def leave_trainers() -> None:
    """Undo `join_trainers` for Trainers that are made from now on. Local."""
    trainer = sys.modules.get("transformers.trainer")
    if trainer is not None:
        callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
        callbacks[:] = [callback for callback in callbacks if callback.__name__ != _NAME]


_NAME = "GradPruneRotation"


def _rotating(base: Any) -> Any:
    """A callback class of the Trainer whose `TrainerCallback` is given."""

    class GradPruneRotation(base):
        """Rotates after each save, and at the end, when the Trainer may drop one more."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            engine = engine_of(kwargs["model"], kwargs["optimizer"])
            rotate_for(getattr(engine, "gradprune", None), args)

        on_train_end = on_save

    return GradPruneRotation
