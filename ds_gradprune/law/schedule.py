"""What both laws share: the schedule before the law, density and integer k, small statistics."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.records import CHUNK_NUMEL, Cause, Decision


class Choice(NamedTuple):
    """What a rule wants: kept elements per chunk, and why."""

    k: int
    cause: Cause
    reason: str


@functools.lru_cache(maxsize=1024)
def kept_per_chunk(density: float) -> int:
    """Elements kept of each chunk: k = max(1, ceil(density * CHUNK_NUMEL)).

    Args:
        density: kept / all, in (0, 1].

    Returns:
        k, 1 .. CHUNK_NUMEL. k == CHUNK_NUMEL is the dense path.

    Raises:
        ValueError: the density is out of range.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density!r}.")
    return max(1, math.ceil(density * CHUNK_NUMEL))


def first_decision(config: GradientPruningConfig) -> Decision:
    """The decision for step 1: the schedule alone, since nothing has been measured."""
    choice = schedule(config, 1)
    assert choice is not None  # step 1 is always before the law begins
    return Decision(
        step=1,
        density=choice.k / CHUNK_NUMEL,
        cause=choice.cause,
        reason=choice.reason,
        performance=None,
        budget_s=config.step_time_budget_s,
        network_changed=False,
    )


def schedule(config: GradientPruningConfig, step: int) -> Choice | None:
    """Warm-up and ramp; None once the law decides.

    With ramp_steps 0 the first step after warm-up still belongs here: nothing has been measured
    at a pruned density yet.
    """
    if step <= config.warmup_steps:
        return Choice(
            CHUNK_NUMEL, Cause.WARMUP, f"warm-up step {step} of {config.warmup_steps}: dense"
        )
    position = step - config.warmup_steps
    if position > max(1, config.ramp_steps):
        return None
    first, last = config.density.max, config.density.initial
    density = last
    if position < config.ramp_steps:
        density = first * (last / first) ** ((position - 1) / (config.ramp_steps - 1))
    k = max(kept_per_chunk(last), min(kept_per_chunk(first), kept_per_chunk(density)))
    reason = f"ramp step {position} of {config.ramp_steps}: density {k / CHUNK_NUMEL:.4f}"
    if config.ramp_steps == 0:
        reason = f"start of pruning: density {k / CHUNK_NUMEL:.4f}"
    return Choice(k, Cause.RAMP, reason)


def target_at(config: GradientPruningConfig, step: int) -> float:
    """The performance target of one step: the last point of its schedule that has begun.

    Args:
        config: the validated block.
        step: optimizer step, counted from 1.

    Returns:
        What P(t) must reach.
    """
    points = config.performance_target_schedule or ()
    begun = (point.target for point in reversed(points) if point.step <= step)
    return next(begun, config.performance_target)


def keep_last(values: tuple[float, ...], value: float | None, most: int) -> tuple[float, ...]:
    """The values and one more, if it is a time, cut to the newest."""
    return (*values, value)[-most:] if is_time(value) else values


def is_time(time_s: float | None) -> TypeGuard[float]:
    """A time that a clock can have measured: a nanosecond to thirty years."""
    return time_s is not None and 1e-9 <= time_s <= 1e9  # False for nan, too


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])
