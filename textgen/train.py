"""The training loop as a function. Knows nothing of what the engine does with its gradients.

The loop draws no random number whose value depends on the past: a micro step's generator is seeded
from its position alone, so evaluation, progress and saving cannot change a run, and a resumed run
needs no random state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from textgen.data import START, Position, TokenData
from textgen.progress import Progress


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run should do.

    Attributes:
        steps: optimizer steps of the whole run.
        done: steps finished before, 0 .. steps.
        seed: of dropout and other random numbers inside the model.
        rank: of this process.
        world_size: number of processes.
        eval_every: validate every so many steps; None: at the start and the end only.
        save_every: save every so many steps; None: at the end only.
        since: where in the data the number of processes became what it is.
    """

    steps: int
    seed: int
    done: int = 0
    rank: int = 0
    world_size: int = 1
    eval_every: int | None = None
    save_every: int | None = None
    since: Position = START


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One finished optimizer step on this rank.

    Attributes:
        step: counted from 1.
        loss: training loss of this rank, mean over its micro steps.
        step_time_s: wall clock of the step, without validation and saving.
    """

    step: int
    loss: float
    step_time_s: float


@dataclass(slots=True)
class TrainResult:
    """What came out of a run.

    Attributes:
        steps: steps finished, those before a resume included.
        stopped: the run was asked to end early.
        val_losses: (step, loss) in order; equal on all ranks. Step 0 is the untrained model.
    """

    steps: int
    stopped: bool = False
    val_losses: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the caller wants to happen around the loop. Every rank needs the same collective ones.

    Attributes:
        sum_over_ranks: sums floats over ranks. Collective.
        share: which part of the validation text is this rank's, of how many; equal counts on all.
            None: as the plan's ranks.
        stop: asked after every step; True, on all ranks at once, ends the run. Collective.
        save: called with the run so far after every `save_every` steps, and at the end. Collective.
        on_step: called after every step. Local.
        progress_fields: of a step, short name to short value: what to show of it. Local.
        on_validation: called with the run so far and the loss of own weights, if it was measured.
            Collective.
        measures_own: validate a second time with gradients on. What sees other weights then, as
            an island does, has a loss of its own.
    """

    sum_over_ranks: Callable[[Sequence[float]], list[float]] = list
    share: Callable[[], tuple[int, int]] | None = None
    stop: Callable[[], bool] = lambda: False
    save: Callable[[TrainResult], None] = lambda result: None
    on_step: Callable[[StepRecord], None] = lambda record: None
    progress_fields: Callable[[StepRecord], dict[str, str]] = lambda record: {
        "loss": f"{record.loss:.3f}"
    }
    on_validation: Callable[[TrainResult, float | None], None] = lambda result, own: None
    measures_own: bool = False


def run(
    engine: Any,
    data: TokenData,
    plan: Plan,
    *,
    hooks: Hooks,
    progress: Progress,
    val_losses: Sequence[tuple[int, float]] = (),
) -> TrainResult:
    """Train an engine to the end of its plan, or until asked to stop.

    Args:
        engine: a DeepSpeed engine, or anything with its `__call__`, `backward`, `step`, `train`,
            `gradient_accumulation_steps`, `train_micro_batch_size_per_gpu`, `device`. Its model
            takes `input_ids` and `labels` and returns an object with `loss`.
        data: where batches come from.
        plan: what to do.
        hooks: see there.
        progress: where it is shown.
        val_losses: of the run that is resumed.

    Returns:
        The steps and the validation losses, equal on all ranks.

    Collective: all ranks, with equal plans but for the rank.
    """
    result = TrainResult(plan.done, val_losses=list(val_losses))
    engine.train(True)  # a model loaded by transformers is in evaluation mode
    if not result.val_losses:
        _validate(engine, data, plan, hooks, progress, result)
    while result.steps < plan.steps and not result.stopped:
        record = _step(engine, data, plan, result.steps)
        result.steps = record.step
        hooks.on_step(record)
        shown = hooks.progress_fields(record)
        shown["time"] = f"{record.step_time_s:.3f} s"
        progress.step(record.step, shown)
        result.stopped = hooks.stop() and record.step < plan.steps
        if record.step == plan.steps or _is_due(record.step, plan.eval_every):
            _validate(engine, data, plan, hooks, progress, result)
        if record.step == plan.steps or result.stopped or _is_due(record.step, plan.save_every):
            hooks.save(result)
    progress.close()
    return result


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _step(engine: Any, data: TokenData, plan: Plan, done: int) -> StepRecord:
    """One optimizer step: all its micro steps."""
    began = time.perf_counter()
    micro_steps: int = engine.gradient_accumulation_steps()
    micro_batch: int = engine.train_micro_batch_size_per_gpu()
    losses = []
    for micro_step in range(micro_steps):
        tokens = data.sample_batch(
            done,
            micro_step,
            micro_steps=micro_steps,
            micro_batch=micro_batch,
            rank=plan.rank,
            world_size=plan.world_size,
            since=plan.since,
        ).to(engine.device)
        torch.manual_seed(_position_seed(plan.seed, done, micro_step, plan.rank))
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        losses.append(loss.detach())
        engine.step()
    mean = float(torch.stack(losses).float().mean())
    return StepRecord(done + 1, mean, time.perf_counter() - began)


def _validate(
    engine: Any,
    data: TokenData,
    plan: Plan,
    hooks: Hooks,
    progress: Progress,
    result: TrainResult,
) -> None:
    """Append the loss over the fixed validation sequences to the result. Collective."""
    own = None
    engine.train(False)
    loss = _loss_over(engine, data, plan, hooks)
    if hooks.measures_own and result.steps:
        own = _loss_over(engine, data, plan, hooks, with_grad=True)
    engine.train(True)
    result.val_losses.append((result.steps, loss))
    beside = "" if own is None else f" (own weights {own:.4f})"
    progress.note(f"validation loss {loss:.4f}{beside} after step {result.steps}")
    hooks.on_validation(result, own)


def _loss_over(
    engine: Any, data: TokenData, plan: Plan, hooks: Hooks, *, with_grad: bool = False
) -> float:
    """Mean loss over the validation sequences of all ranks. Collective."""
    total, count = 0.0, 0
    rank, count_of_ranks = hooks.share() if hooks.share else (plan.rank, plan.world_size)
    for batch in data.validation_batches(
        engine.train_micro_batch_size_per_gpu(), rank, count_of_ranks
    ):
        tokens = batch.tokens.to(engine.device)
        with torch.set_grad_enabled(with_grad):
            loss = engine(input_ids=tokens, labels=tokens).loss.detach()
        total += float(loss) * batch.num_sequences
        count += batch.num_sequences
    total, count_all = hooks.sum_over_ranks([total, float(count)])
    return total / count_all


def _position_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """A 63-bit seed for one micro step of one rank; different positions, unrelated streams."""
    state = np.random.SeedSequence([seed, step, micro_step, rank]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
