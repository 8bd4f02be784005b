"""The Hugging Face Trainer, and every trainer of TRL, over pruned exchanges.

One line after the Trainer was made::

    from ds_gradprune.trainer import follow

    trainer = transformers.Trainer(model=..., args=TrainingArguments(deepspeed=..., ...), ...)
    follow(trainer)
    trainer.train()

The Trainer's configuration needs a `gradient_pruning` block. Its logs then hold our numbers, in the
progress bar, in `trainer_state.json` and in whatever `report_to` names. Its `save_total_limit`
holds on every host.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from typing import Any

import ds_gradprune
from ds_gradprune.config import BLOCK, load_block
from ds_gradprune.errors import MissingDependencyError, UnsupportedError
from ds_gradprune.law.decision import Cause
from ds_gradprune.law.schedule import target_at
from ds_gradprune.train.report import Totals

try:
    from transformers import TrainerCallback
except ImportError as exc:
    raise MissingDependencyError(
        'ds_gradprune.trainer needs transformers. Run: pip install "transformers>=5,<6" accelerate'
    ) from exc

__all__ = ["GradPruneCallback", "follow", "numbers"]

PREFIX = "gradprune/"


def follow(trainer: Any) -> GradPruneCallback:
    """Prune what this Trainer exchanges, show our numbers in its logs, rotate our files.

    Call it on all ranks between the Trainer's construction and `train()`; twice is fine. Local.

    Args:
        trainer: a `transformers.Trainer` or a class derived from it.

    Returns:
        The callback, first in the Trainer's list.

    Raises:
        UnsupportedError: the Trainer trains without DeepSpeed, has made its engine already,
            miscounts the ranks, or holds a reference model that would be gathered over the link.
        ConfigError: the DeepSpeed configuration's `gradient_pruning` block is missing or wrong.
    """
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        raise UnsupportedError(
            "follow(trainer) needs a Trainer that trains with DeepSpeed. Pass deepspeed=... with a "
            f"{BLOCK} block to TrainingArguments, or a DeepSpeed plugin to accelerate."
        )
    config = load_block(plugin.hf_ds_config.config)
    _check_ranks(trainer.args)
    _keep_auto(plugin)
    handler = trainer.callback_handler
    ours = [each for each in handler.callbacks if isinstance(each, GradPruneCallback)]
    callback = ours[0] if ours else GradPruneCallback()
    callback.watch(trainer)
    if config.enabled and config.prune == "update":
        _check_references(trainer)
    # The Trainer's own list, in which the integrations of report_to come first.
    others = [each for each in handler.callbacks if each not in ours]
    handler.callbacks[:] = [callback, *others]
    return callback


class GradPruneCallback(TrainerCallback):
    """What `follow` puts in front of a Trainer's callbacks.

    It can also be passed as `Trainer(callbacks=[GradPruneCallback()])`. The Trainer then puts the
    integrations of `report_to` before it: they do not see our numbers, `follow` shows them.
    Constructing it registers, see `ds_gradprune.register`.

    Attributes:
        handle: `engine.gradprune` of the training under way; None before it has begun.
    """

    def __init__(self) -> None:
        self.handle: Any = None
        self._trainer: weakref.ref[Any] | None = None
        self._before = Totals()
        ds_gradprune.register()

    def watch(self, trainer: Any) -> None:
        """Take the engine from this Trainer. Local.

        Raises:
            UnsupportedError: it has one already, which was made without us.
        """
        self._trainer = weakref.ref(trainer)
        engine = trainer.model_wrapped
        if engine is not trainer.model and hasattr(engine, "global_steps"):
            _handle_of(engine)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The engine is made: take its handle.

        Raises:
            UnsupportedError: the engine was made without us, or the Trainer miscounts the ranks.
            RankMismatchError: ranks were given different steps, intervals, seeds or data.

        Collective: all ranks.
        """
        if args.deepspeed_plugin is not None:
            args.deepspeed_plugin.__dict__.pop("fill_match", None)
        self.handle = _handle_of(self._engine(kwargs["model"], kwargs["optimizer"]))
        self._before = self.handle.totals
        _check_ranks(args)
        from ds_gradprune.deepspeed.trainers import compare_trainers

        data = getattr(self._trainer() if self._trainer is not None else None, "train_dataset", ())
        count = len(data) if hasattr(data, "__len__") else None
        compare_trainers(self.handle, args, state.max_steps, count)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add our numbers to a line about training; lines about evaluation stay as they are."""
        logs: Any = kwargs.get("logs") or {}
        if "loss" not in logs or not state.is_world_process_zero:
            return
        if self.handle is None or self.handle.report is None:
            return
        found = numbers(self.handle, self._before)
        self._before = self.handle.totals
        logs.update(found)
        # The history has a copy of the line, made before callbacks saw it.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Delete our files of checkpoints that the Trainer has deleted on rank 0's host.

        Collective: all ranks.
        """
        # deepspeed is imported by whoever trains with it, and not for this module's sake.
        from ds_gradprune.deepspeed.trainers import rotate_for

        rotate_for(self.handle, args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With `load_best_model_at_end` the Trainer has just deleted one more."""
        self.on_save(args, state, control)

    def _engine(self, model: Any, optimizer: Any) -> Any:
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is not None:
            return trainer.model_wrapped
        from ds_gradprune.deepspeed.trainers import engine_of

        return engine_of(model, optimizer)


def numbers(handle: Any, before: Totals) -> dict[str, float]:
    """What a line of the Trainer's log gets. Local.

    Args:
        handle: `engine.gradprune`, with a report.
        before: its totals at the line before.

    Returns:
        The names are `gradprune/` and density (of the last exchange), performance (P), target,
        mb (sent by this rank per optimizer step since the line before), link_mbit, interval
        (optimizer steps per exchange) and compression (bytes that DeepSpeed would have sent, over
        those that were sent), compute_s, codec_s, exposed_s and hidden_s (seconds per step of
        computation, that the last exchange was coded, was waited for, and went on beside the
        computation), residual_norm
        (of what this rank has not sent yet) and cause (number of the rule that decided last, in the
        order of `Cause`). What is not known yet is left out.
    """
    report, totals = handle.report, handle.totals
    steps = totals.steps - before.steps
    sent = totals.wire_bytes - before.wire_bytes
    rate, compute_s = report.decision.rate_bytes_per_s, report.compute_time_s
    found: Mapping[str, float | None] = {
        "density": report.density,
        "performance": report.performance,
        "target": target_at(handle.config, report.step),
        "mb": sent / steps / 1e6 if steps else None,
        "link_mbit": None if rate is None else rate * 8e-6,
        "interval": report.steps,
        "compression": (totals.dense_bytes - before.dense_bytes) / sent if sent else None,
        "compute_s": None if compute_s is None else compute_s / report.steps,
        "codec_s": report.codec_time_s / report.steps,
        "exposed_s": report.comm_time_s / report.steps,
        "hidden_s": report.hidden_time_s / report.steps,
        "residual_norm": handle.residual_norm(),
        "cause": list(Cause).index(report.decision.cause),
    }
    return {PREFIX + name: value for name, value in found.items() if value is not None}


def _handle_of(engine: Any) -> Any:
    if not hasattr(engine, "global_steps"):
        raise UnsupportedError(
            "gradient pruning needs a Trainer that trains with DeepSpeed, and this one has no "
            f"engine. Pass deepspeed=... with a {BLOCK} block to TrainingArguments."
        )
    handle = getattr(engine, "gradprune", None)
    if handle is None:
        raise UnsupportedError(
            "the Trainer's DeepSpeed engine was made without gradient pruning. Call "
            "ds_gradprune.trainer.follow(trainer) before trainer.train(), and let nothing else "
            "replace deepspeed.initialize after it."
        )
    return handle


def _keep_auto(plugin: Any) -> None:
    """Let "auto" stand in our block until the engine is made. Local.

    accelerate 1.15.0 wants to fill in every "auto" of the configuration, and refuses those that it
    does not know; in our block they have a meaning. The Trainer pickles the plugin with each
    checkpoint, so it is given back before.
    """
    original = plugin.fill_match

    def fill_match(key: str, *args: Any, **kwargs: Any) -> None:
        if not key.startswith(f"{BLOCK}."):
            original(key, *args, **kwargs)

    plugin.fill_match = fill_match


def _check_references(trainer: Any) -> None:
    """No other engine of the trainer may gather its weights over the slow link. Local.

    TRL makes the engine of a reference model while the trainer itself is made.
    """
    for name, engine in vars(trainer).items():
        if engine is trainer.model_wrapped or not hasattr(type(engine), "zero_optimization_stage"):
            continue
        if (
            engine.zero_optimization_stage() == 3
            and engine.mpu is None
            and trainer.args.world_size > 1
        ):
            raise UnsupportedError(
                f"trainer.{name} is an engine at ZeRO stage 3 whose weights are spread over all "
                "hosts: each forward would gather them over the slow link. Call "
                "ds_gradprune.register() before the trainer is made."
            )


def _check_ranks(args: Any) -> None:
    """Accelerate must count the ranks that the launcher started. Local.

    accelerate 1.15.0 counts one process where DeepSpeed runs on CPUs and nobody said so.
    """
    ranks = int(os.environ.get("WORLD_SIZE", args.world_size))
    if args.world_size != ranks:
        raise UnsupportedError(
            f"the Trainer counts {args.world_size} processes where the launcher started {ranks}: "
            "all would read the same data and write the same files. On CPUs pass use_cpu=True to "
            "TrainingArguments; elsewhere make TrainingArguments after the launcher's variables "
            "are set."
        )
