"""What the exchanges say about the network, and so what a step would cost.

`alarm` tells that the network has changed and `link_cost` what an exchange costs; here their
answers meet the rest of what a step costs. A dense exchange is another collective than a pruned
one, so each has its own window. What a dense byte costs in pruned ones is measured at each switch
from one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.law import alarm, codec_cost, link_cost
from ds_gradprune.law.alarm import AlarmState
from ds_gradprune.law.codec_cost import CodecTimes
from ds_gradprune.law.decision import KeptElements
from ds_gradprune.law.link_cost import LinkCost, LinkCostState
from ds_gradprune.law.prices import HIDDEN_COST, Prices, line_through
from ds_gradprune.law.signals import StepSignals
from ds_gradprune.law.stats import (
    LEAST_S,
    Bytes,
    Change,
    Count,
    Samples,
    Seconds,
    Within,
    is_time,
    keep_last,
    median,
)

UP_STEPS = 12
"""Steps at a density before it rises without a change of the network."""

FORMER_STEPS = 12
"""Exchanges in which an alarm "slower" may turn out to have been stalls."""

_AS_BEFORE = 1.35
"""An exchange up to so many times as long as before is as before."""

_FACTOR_LEAST, _FACTOR_MOST = 0.2, 5.0
"""Bounds of what a dense byte costs in pruned ones."""

_SIZE_SPREAD = 1.25
"""Two numbers of kept elements this far apart draw a line through the bytes."""

_COST_STEPS = 3
"""Exchanges behind a cost before it is compared with another collective's."""

_HIDDEN = 8
"""Pruned exchanges behind the median of what hides where it is measured."""

_QUARTILE = 0.6745
"""Distance of a quartile from the median, in standard deviations."""

CostPerByte = Annotated[float, Within(0.0)]
"""Seconds per byte."""


class NetworkState(NamedTuple):
    """What is known of the exchanges.

    Attributes:
        alarm: its samples are all dense or all pruned.
        cost: what an exchange costs; likewise.
        is_dense: which they are.
        former: exchanges from before the network became slower, while it may still turn out that
            it did not.
        former_steps: exchanges since.
        as_before: the newest exchange was as the former ones.
        codec: what the codec takes.
        sizes: (k, bytes) of the newest pruned exchange, then of one with another k; at most two.
        dense_bytes: of a dense exchange; 0: unknown.
        dense_cost: seconds per byte of a dense exchange, on the network as it is now, or None.
        pruned_cost: the same of a pruned one.
        dense_factor: dense_cost / pruned_cost, when both were last known.
        hidden_times_s: what hid of the last pruned exchanges, where that is measured; oldest first.
    """

    alarm: AlarmState = AlarmState()
    cost: LinkCostState = LinkCostState()
    is_dense: bool = True
    former: Samples = ()
    former_steps: Count = 0
    as_before: bool = False
    codec: CodecTimes = CodecTimes()
    sizes: tuple[tuple[KeptElements, Bytes], ...] = ()
    dense_bytes: Count = 0
    dense_cost: CostPerByte | None = None
    pruned_cost: CostPerByte | None = None
    dense_factor: Annotated[float, Within(_FACTOR_LEAST, _FACTOR_MOST)] = 1.0
    hidden_times_s: tuple[Seconds, ...] = ()


class Network(NamedTuple):
    """What is known after a step.

    Attributes:
        state: for the next step.
        cost: what an exchange costs; None when this step's signals tell of none.
        change: how the network has changed; None: it has not.
    """

    state: NetworkState
    cost: LinkCost | None = None
    change: Change | None = None


def observe(state: NetworkState, signals: StepSignals) -> Network:
    """Take in the exchange that the signals tell of, if they tell of one."""
    timed, time_s, wire_bytes = signals.timed_density, signals.comm_time_s, signals.wire_bytes
    if timed is None or not is_time(time_s) or wire_bytes <= 0:
        return Network(state)
    # What an unpruned warm-up sends goes by the same collective as what is pruned.
    is_dense = timed == 1.0 and not signals.timed_unpruned
    seen = _measure(state, is_dense, time_s, wire_bytes)
    k = round(timed * CHUNK_NUMEL)
    codec, sizes, hidden_times_s = state.codec, state.sizes, state.hidden_times_s
    if not signals.timed_unpruned:
        codec = codec_cost.observe(codec, k, signals.codec_time_s)
    if k != CHUNK_NUMEL:
        sizes = _sizes(sizes, k, wire_bytes)
    if not is_dense:
        hidden_times_s = _hidden(hidden_times_s, signals.hidden_time_s)
    dense_cost, pruned_cost, dense_factor = _costs(state, seen, is_dense)
    after = NetworkState(
        seen.alarm,
        seen.cost_state,
        is_dense,
        seen.former,
        seen.former_steps,
        seen.as_before,
        codec,
        sizes,
        signals.dense_bytes or state.dense_bytes,
        dense_cost,
        pruned_cost,
        dense_factor,
        hidden_times_s,
    )
    return Network(after, seen.cost, seen.change)


def _hidden(times_s: tuple[float, ...], hidden_s: float) -> tuple[float, ...]:
    """What hid lately. Nothing, once something has, counts as next to nothing."""
    if not times_s and hidden_s <= 0.0:
        return ()
    return keep_last(times_s, max(LEAST_S, hidden_s), _HIDDEN)


class _Seen(NamedTuple):
    """What one exchange did to alarm and cost."""

    alarm: AlarmState
    cost_state: LinkCostState
    cost: LinkCost
    change: Change | None = None
    former: Samples = ()
    former_steps: int = 0
    as_before: bool = False


def _measure(state: NetworkState, is_dense: bool, time_s: float, wire_bytes: int) -> _Seen:
    """Alarm, cost, drift, and whether an alarm is taken back."""
    alarms, costs, former = state.alarm, state.cost, state.former
    if is_dense != state.is_dense:  # another collective: its times are no measure for the others
        alarms = alarm.restart(alarms)
        costs = LinkCostState(noise=costs.noise, noise_numel=costs.noise_numel)
        former = ()
    before = costs.samples
    alarms, change = alarm.watch(alarms, time_s, wire_bytes)
    overhead_s = alarms.overhead_s
    keep = None if change is None else len(alarms.samples)
    costs, cost = link_cost.observe(costs, time_s, wire_bytes, overhead_s=overhead_s, keep=keep)
    if keep is not None:
        former = before[: len(before) + 1 - keep] if change == "slower" else ()
        return _Seen(alarms, costs, cost, change, former)
    if cost.drift is not None:
        return _Seen(alarm.restart(alarms, costs.samples), costs, cost, cost.drift)
    if not former or state.former_steps >= FORMER_STEPS:
        return _Seen(alarms, costs, cost)
    is_as_before = _is_as_before(former, overhead_s, time_s, wire_bytes)
    if not (is_as_before and state.as_before):
        return _Seen(alarms, costs, cost, None, former, state.former_steps + 1, is_as_before)
    costs, cost = link_cost.go_back(costs, former, overhead_s)
    return _Seen(alarm.restart(alarms, costs.samples), costs, cost, "faster")


def _is_as_before(former: Samples, overhead_s: float, time_s: float, wire_bytes: int) -> bool:
    """Would the network of the former exchanges have been about as slow?"""
    size = former[-1][0]
    usual_s = median([former_s * size / former_bytes for former_bytes, former_s in former])
    overhead_s = min(overhead_s, usual_s)
    expected_s = overhead_s + (usual_s - overhead_s) * wire_bytes / size
    return time_s < _AS_BEFORE * expected_s


def _costs(
    state: NetworkState, seen: _Seen, is_dense: bool
) -> tuple[float | None, float | None, float]:
    """Seconds per byte of dense and of pruned exchanges, None if from another network; factor."""
    dense_cost, pruned_cost = state.dense_cost, state.pruned_cost
    if seen.change is not None:
        dense_cost = pruned_cost = None
    factor = state.dense_factor
    if seen.cost.samples >= _COST_STEPS:
        if is_dense:
            dense_cost = seen.cost.seconds_per_byte
        else:
            pruned_cost = seen.cost.seconds_per_byte
        if dense_cost is not None and pruned_cost is not None and seen.cost.samples <= UP_STEPS:
            factor = max(_FACTOR_LEAST, min(_FACTOR_MOST, dense_cost / pruned_cost))
    return dense_cost, pruned_cost, factor


def _sizes(
    sizes: tuple[tuple[int, int], ...], k: int, wire_bytes: int
) -> tuple[tuple[int, int], ...]:
    """The newest size, and the last one whose k was far enough from it to draw a line."""
    for other in sizes:
        if not codec_cost.are_near(other[0], k, _SIZE_SPREAD):
            return ((k, wire_bytes), other)
    return ((k, wire_bytes),)


def prices_of(
    config: GradientPruningConfig, network: Network, ordered_s: Sequence[float], interval: int
) -> Prices | None:
    """What things cost now; None while something is unknown.

    Args:
        config: the validated block.
        network: what is known of the exchanges.
        ordered_s: computation of the last steps, in rising order.
        interval: optimizer steps from one exchange to the next.
    """
    cost, state = network.cost, network.state
    if cost is None or not ordered_s or not state.sizes:
        return None
    compute_s = ordered_s[len(ordered_s) // 2]
    spread_s = 0.0
    if config.step_time_budget_s is not None:
        # The lower half alone: stragglers, which no density helps, sit in the upper one.
        spread_s = (compute_s - ordered_s[len(ordered_s) // 4]) / _QUARTILE
    hide_s = config.delay_of(interval) * compute_s
    if state.hidden_times_s:  # no more than has hidden so far: what else would is not known
        hide_s = median(state.hidden_times_s)
    fixed_bytes, bytes_per_k = line_through(state.sizes)
    codec_s, codec_per_k_s = codec_cost.line_of(state.codec)
    seconds_per_byte, factor = cost.seconds_per_byte, state.dense_factor
    if state.is_dense:
        seconds_per_byte /= factor
    elif state.dense_cost is not None:  # measured on the network as it is: better than a factor
        factor = state.dense_cost / seconds_per_byte
    return Prices(
        compute_s,
        spread_s,
        codec_s,
        codec_per_k_s,
        codec_cost.dense_s_of(state.codec),
        cost.overhead_s,
        seconds_per_byte,
        cost.noise,
        fixed_bytes,
        bytes_per_k,
        float(state.dense_bytes),
        factor,
        hide_s,
        interval,
        HIDDEN_COST if config.step_time_budget_s is None else 0.0,
    )
