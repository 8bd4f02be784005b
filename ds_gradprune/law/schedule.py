"""What goes by the step number alone: warm-up, ramp, the targets of P(t), and patience.

Between islands an exchange may come every `sync_every` steps. The law's patience is meant in steps,
because what it waits for is learning, or time that passes. So where exchanges are rare it waits for
few of them.
"""

from __future__ import annotations

import functools
import math

from ds_gradprune.bucket.layout import CHUNK_NUMEL, kept_per_chunk
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.law import arithmetic
from ds_gradprune.law.decision import Cause, Choice, Decision, name

_GRID = 2.0**20
"""The ramp's kept elements are rounded to this part of one before they are rounded up: a density
that is meant to be whole may come out a hair above."""


def first_decision(config: GradientPruningConfig) -> Decision:
    """The decision for step 1: the schedule alone, since nothing has been measured."""
    choice = scheduled(config, 1, unpruned=config.warmup_form == "unpruned")
    assert choice is not None  # step 1 is always before the law begins
    return Decision(
        step=1,
        density=choice.k / CHUNK_NUMEL,
        cause=choice.cause,
        reason=choice.text,
        performance=None,
        budget_s=config.step_time_budget_s,
        network_changed=False,
        interval=config.first_interval,
        unpruned=choice.cause is Cause.WARMUP and config.warmup_form == "unpruned",
    )


def scheduled(config: GradientPruningConfig, step: int, *, unpruned: bool = False) -> Choice | None:
    """Warm-up and ramp; None once the law decides.

    With ramp_steps 0 the first step after warm-up still belongs here: nothing has been measured
    at a pruned density yet.

    Args:
        config: the validated block.
        step: optimizer step, counted from 1.
        unpruned: the warm-up is not dense.
    """
    if step <= config.warmup_steps:
        form = "unpruned" if unpruned else "dense"
        text = f"warm-up step {step} of {config.warmup_steps}: {form}"
        return Choice(CHUNK_NUMEL, Cause.WARMUP, text)
    if step > last_scheduled(config):
        return None
    position = step - config.warmup_steps
    k = _ramp_k(config, position)
    text = f"ramp step {position} of {config.ramp_steps}: density {name(k)}"
    if config.ramp_steps == 0:
        text = f"start of pruning: density {name(k)}"
    return Choice(k, Cause.RAMP, text)


def last_scheduled(config: GradientPruningConfig) -> int:
    """The last step that goes by its number: the ramp's, or the first pruned one."""
    return config.warmup_steps + (config.ramp_steps or 1)


def _ramp_k(config: GradientPruningConfig, position: int) -> int:
    """Kept elements per chunk in step `position` of the ramp, from 1; geometric."""
    first, last = config.density.max, config.density.initial
    least, most = kept_per_chunk(last), kept_per_chunk(first)
    if position >= config.ramp_steps:
        return least
    share = (position - 1) / (config.ramp_steps - 1)
    exact = CHUNK_NUMEL * first * arithmetic.power(last / first, share)
    return max(least, min(most, math.ceil(round(exact * _GRID) / _GRID)))


def next_exchange(
    config: GradientPruningConfig, step: int, interval: int, *, unpruned: bool
) -> int:
    """The step that the next exchange follows; in a dense warm-up the next step.

    The exchange that passes the ramp's end counts as at that end, so that none is skipped; so does
    the one that passes the end of an unpruned warm-up.

    Args:
        config: the validated block.
        step: the step that the last exchange followed, counted from 1.
        interval: optimizer steps from one exchange to the next.
        unpruned: islands step alone in the warm-up, too.
    """
    position = step - config.warmup_steps
    if position < 0 and unpruned:
        return min(step + interval, config.warmup_steps)
    if position < 0 or interval == 1:
        return step + 1
    ahead, ramp_end = position + interval, max(1, config.ramp_steps)
    if position < ramp_end:
        ahead = min(ahead, ramp_end)
    return config.warmup_steps + ahead


@functools.lru_cache(maxsize=256)
def patience(steps: int, interval: int, least: int) -> int:
    """So many exchanges are as long as `steps` steps, but never fewer than `least`."""
    return max(least, -(-steps // interval))


def target_at(config: GradientPruningConfig, step: int) -> float:
    """The target of P(t) in one step: the last point of its schedule that has begun.

    Args:
        config: the validated block.
        step: optimizer step, counted from 1.

    Returns:
        What P(t) must reach.
    """
    points = config.performance_target_schedule
    if points is None:
        return config.performance_target
    begun = (point.target for point in reversed(points) if point.step <= step)
    return next(begun, config.performance_target)
