"""How a run begins: dense or unpruned, and in which rounds.

With `"warmup": "auto"` a trial of the link may begin it unpruned (`opening`). Else the first steps
are DeepSpeed's own. Where their exchanges take longer than the computation after all, islands step
alone from then on, and the rest of the warm-up is unpruned. Else it stays dense. One exchange that
takes five times as long suffices, or two of 2.5 times, and after five that are shorter the form is
settled. Times ride one exchange late.

An unpruned exchange has 2.25 bits a parameter, many times those of a pruned one. So it comes so
seldom that a step is hardly longer for it: every 1, 2, 4 or 8 steps, the fewest at which what is
not hidden takes a tenth of the computation. It begins at an estimate, and moves by one octave at a
time. Only where both `"warmup": "unpruned"` and a number in `sync_every` are given, that number
holds. The ramp after it is cut by the same rule.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ds_gradprune.bucket.layout import CHUNK_NUMEL, kept_per_chunk
from ds_gradprune.config import INTERVALS, GradientPruningConfig
from ds_gradprune.law.decision import Cause, Choice, every
from ds_gradprune.law.interval import inside, nearest
from ds_gradprune.law.prices import Prices
from ds_gradprune.law.schedule import last_scheduled, next_exchange, scheduled
from ds_gradprune.law.signals import StepSignals
from ds_gradprune.law.stats import Seconds, is_time, keep_last, median

MEASURED = 5
"""Dense exchanges that settle the form. Fewer do, if they are longer by as much."""

LEAST_S = 5.0
"""Dense exchanges that take no longer in the rest of the warm-up are not worth another form."""

MOST = 8
"""The longest interval. Two islands lose as much by it as by a dense warm-up, and more by 16 steps
(results/convergence_cpu_202611_warmup_rounds.md)."""

SHARE = 0.1
"""What an exchange adds to a step may take this share of the computation."""

_INDEX_BITS = 8
"""Of a kept element, which one that is sent with all others does not need."""

_WINDOW = 3
"""Unpruned exchanges behind a median."""


class WarmupState(NamedTuple):
    """What is known of the warm-up's exchanges.

    Attributes:
        form: what "auto" has chosen; "open": nothing yet.
        dense_times_s: what dense exchanges took while it was open, oldest first.
        wire_times_s: what the last unpruned ones took on the wire, oldest first.
        codec_times_s: what selecting, encoding and decoding took in them.
        unpruned: the exchange that is next or under way is one of them.
    """

    form: Literal["open", "dense", "unpruned"] = "open"
    dense_times_s: tuple[Seconds, ...] = ()
    wire_times_s: tuple[Seconds, ...] = ()
    codec_times_s: tuple[Seconds, ...] = ()
    unpruned: bool = False


class Beginning(NamedTuple):
    """What warm-up and ramp want of the next exchange.

    Attributes:
        choice: its density and interval.
        unpruned: it is one of an unpruned warm-up.
    """

    choice: Choice
    unpruned: bool


def observe(
    config: GradientPruningConfig,
    state: WarmupState,
    signals: StepSignals,
    computes_s: tuple[float, ...],
) -> WarmupState:
    """Take in the exchange that the signals tell of, if it was one of the warm-up.

    Args:
        config: the validated block.
        state: what was known.
        signals: of the exchange that is over.
        computes_s: computation of the last steps.
    """
    if signals.timed_density != 1.0 or not is_time(signals.comm_time_s):
        return state
    if signals.timed_unpruned:
        return state._replace(
            wire_times_s=keep_last(state.wire_times_s, signals.comm_time_s, _WINDOW),
            codec_times_s=keep_last(state.codec_times_s, signals.codec_time_s, _WINDOW),
        )
    is_open = config.warmup_form == "auto" and state.form == "open"
    if not is_open or not computes_s or signals.step >= config.warmup_steps:
        return state
    dense_s = (*state.dense_times_s, signals.comm_time_s)
    rest = config.warmup_steps - signals.step
    is_dear = len(dense_s) * median(dense_s) > MEASURED * median(computes_s)
    if is_dear and rest * median(dense_s) > LEAST_S:
        # A first estimate: two islands send so much less. With more it is too short.
        wire_s = median(dense_s) * config.unpruned_bits / 32
        return WarmupState("unpruned", dense_s, keep_last((), wire_s, 1))
    return WarmupState("open" if len(dense_s) < MEASURED else "dense", dense_s)


def begin(
    config: GradientPruningConfig,
    before: WarmupState,
    state: WarmupState,
    step: int,
    computes_s: tuple[float, ...],
    ways: tuple[int, int],
    prices: Prices | None,
) -> Beginning | None:
    """What the next exchange is by the schedule; None once the law decides.

    Args:
        config: the validated block.
        before: what was known of the warm-up's exchanges before the newest.
        state: what is known now.
        step: the step that the last exchange followed.
        computes_s: computation of the last steps.
        ways: the interval in force, and the one after the warm-up.
        prices: what a pruned step costs; None while unknown.
    """
    if step >= last_scheduled(config):
        return None
    used, planned = ways
    form = config.warmup_form
    unpruned = form == "unpruned" or (form == "auto" and state.form == "unpruned")
    way = used if unpruned and step < config.warmup_steps else inside(config, used)
    ahead = next_exchange(config, step, way, unpruned=unpruned)
    choice = scheduled(config, ahead, unpruned=unpruned)
    if choice is None:
        return None
    if unpruned and choice.cause is Cause.RAMP:
        choice = _borne(config, state, choice, computes_s, prices)
    unpruned = unpruned and choice.cause is Cause.WARMUP
    interval, text = planned, choice.text
    if config.sync_every == "auto":
        interval = nearest(planned, used)
    if unpruned:
        wanted = borne_interval(config, state, computes_s) or used
        interval = wanted if state.form != before.form else nearest(wanted, used)
        text += "" if interval == used else f", {every(used, interval)}"
    if state.form != before.form:
        dense_s, compute_s = median(state.dense_times_s), median(computes_s)
        text += (
            f", as a dense exchange takes {dense_s:.3g} s beside {compute_s:.3g} s of computation"
        )
    return Beginning(Choice(choice.k, choice.cause, text, interval), unpruned)


def used_interval(config: GradientPruningConfig, state: WarmupState, interval: int) -> int:
    """The interval in force: the law's in an unpruned warm-up, else see `interval.inside`."""
    return max(1, interval) if state.unpruned else inside(config, interval)


def borne_interval(
    config: GradientPruningConfig, state: WarmupState, computes_s: tuple[float, ...]
) -> int | None:
    """Steps between unpruned exchanges that the link bears; None: given, or unknown."""
    is_given = config.sync_every != "auto" and config.warmup == "unpruned"
    if is_given or not state.wire_times_s or not computes_s:
        return None
    compute_s = median(computes_s)

    def added_s(interval: int) -> float:
        hidden_s = config.delay_of(interval, unpruned=True) * compute_s
        exposed_s = max(0.0, median(state.wire_times_s) - hidden_s)
        return (exposed_s + sum(state.codec_times_s[-1:])) / interval

    return next(i for i in INTERVALS if i == MOST or added_s(i) <= SHARE * compute_s)


def _borne(
    config: GradientPruningConfig,
    state: WarmupState,
    choice: Choice,
    computes_s: tuple[float, ...],
    prices: Prices | None,
) -> Choice:
    """A step of the ramp, at most so dense that what is not hidden takes `SHARE` of computation.

    Where nothing hides it stays above the initial density: the law weighs time against learning.
    """
    hides = config.delay_steps > 0
    lowest = config.density.min if hides else config.density.initial
    least = min(kept_per_chunk(lowest), choice.k)
    if prices is not None:
        budget_s = prices.local_s(choice.k) + SHARE * prices.compute_s
        k = prices.affordable_k(budget_s, least, choice.k)
    elif state.wire_times_s and computes_s:
        # No pruned exchange has been timed yet: by what one of everything has taken.
        borne_s = (config.delay_steps + SHARE * config.first_interval) * median(computes_s)
        bits_of_kept = (_INDEX_BITS + config.value_bits) / config.unpruned_bits
        share = borne_s / (bits_of_kept * median(state.wire_times_s))
        k = max(least, min(choice.k, kept_per_chunk(min(1.0, share))))
    else:
        k = choice.k
    if k == choice.k:
        return choice
    return choice._replace(k=k, text=f"{choice.text}, cut to {k / CHUNK_NUMEL:.4f}")
