"""How islands exchange in an unpruned warm-up: everything, in few bits, every few steps.

An unpruned exchange has 4.25 bits a parameter, many times those of a pruned one. With a
`sync_every` of "auto" it comes so seldom that a step is hardly longer for it: every 1, 2, 4, 8 or
16 steps, the fewest at which what is not hidden takes a tenth of the computation. The interval
moves by one octave at a time. A fixed `sync_every` holds in the warm-up, too.
"""

from __future__ import annotations

from typing import NamedTuple

from ds_gradprune.config import INTERVALS, GradientPruningConfig
from ds_gradprune.law.decision import Cause, Choice, every
from ds_gradprune.law.interval import nearest
from ds_gradprune.law.schedule import next_exchange, scheduled
from ds_gradprune.law.signals import StepSignals
from ds_gradprune.law.stats import Seconds, is_time, keep_last, median

MOST = 16
"""The longest interval. Two islands lose no more by it than by an exchange after every step
(results/convergence_cpu_202611_warmup_rounds.md)."""

SHARE = 0.1
"""What an exchange adds to a step may take this share of the computation."""

_WINDOW = 3
"""Exchanges behind a median."""


class WarmupState(NamedTuple):
    """What is known of unpruned exchanges.

    Attributes:
        wire_times_s: what the last ones took on the wire, oldest first.
        codec_times_s: what selecting, encoding and decoding took in them.
    """

    wire_times_s: tuple[Seconds, ...] = ()
    codec_times_s: tuple[Seconds, ...] = ()


def observe(state: WarmupState, signals: StepSignals) -> WarmupState:
    """Take in the exchange that the signals tell of, if it was an unpruned one."""
    if not signals.timed_unpruned or not is_time(signals.comm_time_s):
        return state
    return WarmupState(
        keep_last(state.wire_times_s, signals.comm_time_s, _WINDOW),
        keep_last(state.codec_times_s, signals.codec_time_s, _WINDOW),
    )


class Beginning(NamedTuple):
    """What warm-up and ramp want of the next exchange.

    Attributes:
        choice: its density and interval.
        unpruned: it is one of an unpruned warm-up.
    """

    choice: Choice
    unpruned: bool


def begin(
    config: GradientPruningConfig,
    state: WarmupState,
    step: int,
    *,
    computes_s: tuple[float, ...],
    used: int,
    planned: int,
) -> Beginning | None:
    """What the next exchange is by the schedule; None once the law decides.

    Args:
        config: the validated block.
        state: what is known of unpruned exchanges.
        step: the step that the last exchange followed.
        computes_s: computation of the last steps.
        used: the interval in force.
        planned: the interval after the warm-up.
    """
    unpruned = config.warmup == "unpruned"
    choice = scheduled(config, next_exchange(config, step, used, unpruned=unpruned))
    if choice is None:
        return None
    unpruned = unpruned and choice.cause is Cause.WARMUP
    interval = nearest(planned, used)
    if unpruned:
        interval = _interval(config, state, computes_s, used)
    moves = f", {every(used, interval)}" if unpruned and interval != used else ""
    return Beginning(Choice(choice.k, choice.cause, choice.text + moves, interval), unpruned)


def _interval(
    config: GradientPruningConfig, state: WarmupState, computes_s: tuple[float, ...], used: int
) -> int:
    """Steps to the next unpruned exchange: as `used`, or an octave away."""
    if config.sync_every != "auto" or not state.wire_times_s or not computes_s:
        return used
    compute_s = median(computes_s)

    def added_s(interval: int) -> float:
        hidden_s = config.delay_of(interval) * compute_s
        exposed_s = max(0.0, median(state.wire_times_s) - hidden_s)
        return (exposed_s + sum(state.codec_times_s[-1:])) / interval

    fitting = (i for i in INTERVALS if i == MOST or added_s(i) <= SHARE * compute_s)
    return nearest(next(fitting), used)
