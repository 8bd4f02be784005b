"""The times that the laws judge by: steps at one density, computation, and a rank's own work."""

from __future__ import annotations

from ds_gradprune.law.schedule import patience
from ds_gradprune.law.signals import StepSignals
from ds_gradprune.law.stats import Seconds, is_time, keep_last, median

CONFIRM_STEPS, CONFIRM_LEAST = 3, 2
"""A move is behind the times of so many steps, or of so many exchanges where those are rare."""

BUDGET_FACTOR, LOCAL_STEPS, LOCAL_LEAST = 1.1, 16, 5
"""Without a budget of the user's: so many times the median of a rank's own work, of so many."""


COMPUTE_STEPS, COMPUTE_LEAST = 32, 5
"""Computation times behind a median: of so many steps, since one in five may have a straggler, or
of so many exchanges where those are rare."""


def confirming(interval: int) -> int:
    """Step times that a move needs behind it."""
    return patience(CONFIRM_STEPS, interval, CONFIRM_LEAST)


def step_times(
    times_s: tuple[Seconds, ...], signals: StepSignals, density: float, interval: int
) -> tuple[Seconds, ...]:
    """The last step times at a density, with that of one more exchange; oldest first."""
    if signals.timed_density != density:
        return times_s
    step_s = signals.step_time_s
    step_s = None if step_s is None else step_s / signals.interval
    return keep_last(times_s, step_s, confirming(interval))


def compute_times(
    times_s: tuple[Seconds, ...], signals: StepSignals, interval: int
) -> tuple[Seconds, ...]:
    """The last times of a step's computation, with that of one more exchange; oldest first."""
    compute_s = signals.compute_time_s
    if signals.timed_density is None or compute_s is None:
        return times_s
    most = patience(COMPUTE_STEPS, interval, COMPUTE_LEAST)
    return keep_last(times_s, compute_s / signals.interval, most)


def own_times(
    times_s: tuple[Seconds, ...], signals: StepSignals, interval: int
) -> tuple[Seconds, ...]:
    """The last times of computation and codec, with those of one more exchange; oldest first."""
    codec_s = signals.codec_time_s if is_time(signals.codec_time_s) else 0.0
    local_s = signals.compute_time_s
    local_s = (local_s + codec_s) / signals.interval if is_time(local_s) else None
    return keep_last(times_s, local_s, patience(LOCAL_STEPS, interval, LOCAL_LEAST))


def budget(given_s: float | None, own_s: tuple[Seconds, ...]) -> float | None:
    """The user's budget, else one from a rank's own work; None: not known yet."""
    return BUDGET_FACTOR * median(own_s) if given_s is None and own_s else given_s
