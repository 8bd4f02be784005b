"""What the exchanges say about the network, and so what a step would cost. Pure.

`link` raises the alarm, `meter` says what an exchange costs; here their answers meet the rest of
what a step costs. A dense exchange is another collective than a pruned one: windows are begun anew
when one follows the other, and what a dense byte costs in pruned ones is measured across the move.
"""

from __future__ import annotations

from typing import NamedTuple

from ds_gradprune import link, meter
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.controller.base import is_time, keep_last, median
from ds_gradprune.controller.plan import Prices, line_through
from ds_gradprune.controller.state import UP_STEPS, CodecTimes, NetworkState
from ds_gradprune.records import CHUNK_NUMEL, StepSignals

CODEC_WINDOW_STEPS = 5
"""Codec times behind their median."""

FORMER_STEPS = 12
"""Exchanges in which an alarm "slower" may turn out to have been stalls."""

_AS_BEFORE = 1.35
_FACTOR_LEAST, _FACTOR_MOST = 0.2, 5.0
_SIZE_SPREAD = 1.25
_CODEC_SPREAD, _CODEC_FAR = 1.1, 2.0
_COST_STEPS = 3
_QUARTILE = 0.6745  # distance of a quartile from the median, in standard deviations


class Net(NamedTuple):
    """What is known after a step.

    Attributes:
        state: for the next step.
        reading: what an exchange costs; None when this step's signals tell of none.
        changed: the network changed, and which way.
    """

    state: NetworkState
    reading: meter.Reading | None = None
    changed: link.Change | None = None


def observe(state: NetworkState, signals: StepSignals) -> Net:
    """Take in the exchange that the signals tell of, if they tell of one."""
    timed, time_s, wire_bytes = signals.timed_density, signals.comm_time_s, signals.wire_bytes
    if timed is None or not is_time(time_s) or wire_bytes <= 0:
        return Net(state)
    is_dense = timed == 1.0
    seen = _measure(state, is_dense, time_s, wire_bytes)
    k, sizes = round(timed * CHUNK_NUMEL), state.sizes
    codec = _codec(state.codec, k, signals.codec_time_s)
    if not is_dense:
        sizes = _sizes(sizes, k, wire_bytes)
    after = NetworkState(
        seen.link,
        seen.meter,
        is_dense,
        seen.former,
        seen.former_steps,
        seen.as_before,
        codec,
        sizes,
        signals.dense_bytes or state.dense_bytes,
        *_costs(state, seen, is_dense),
    )
    return Net(after, seen.reading, seen.changed)


class _Seen(NamedTuple):
    """What one exchange did to link and meter."""

    link: link.LinkState
    meter: meter.MeterState
    reading: meter.Reading
    changed: link.Change | None = None
    former: meter.Samples = ()
    former_steps: int = 0
    as_before: bool = False


def _measure(state: NetworkState, is_dense: bool, time_s: float, wire_bytes: int) -> _Seen:
    """Alarm, cost, drift, and whether an alarm is taken back."""
    links, meters, former = state.link, state.meter, state.former
    if is_dense != state.is_dense:  # another collective: its times are no measure for the others
        links = link.LinkState(overhead_s=links.overhead_s, seen=links.seen)
        meters = meter.MeterState(noise=meters.noise, noise_numel=meters.noise_numel)
        former = ()
    before = meters.samples
    links, changed = link.watch(links, time_s, wire_bytes)
    overhead_s = links.overhead_s
    keep = None if changed is None else len(links.samples)
    meters, reading = meter.observe(meters, time_s, wire_bytes, overhead_s=overhead_s, keep=keep)
    if keep is not None:
        former = before[: len(before) + 1 - keep] if changed == "slower" else ()
        return _Seen(links, meters, reading, changed, former)
    if reading.drift is not None:
        return _Seen(_restarted(links, meters.samples), meters, reading, reading.drift)
    if not former or state.former_steps >= FORMER_STEPS:
        return _Seen(links, meters, reading)
    is_as_before = _is_as_before(former, overhead_s, time_s, wire_bytes)
    if not (is_as_before and state.as_before):
        steps = state.former_steps + 1
        return _Seen(links, meters, reading, None, former, steps, is_as_before)
    meters, reading = meter.go_back(meters, former, overhead_s)
    return _Seen(_restarted(links, meters.samples), meters, reading, "faster")


def _is_as_before(former: meter.Samples, overhead_s: float, time_s: float, wire_bytes: int) -> bool:
    """Would the network of the former exchanges have been about as slow?"""
    size = former[-1][0]
    usual_s = median([former_s * size / former_bytes for former_bytes, former_s in former])
    overhead_s = min(overhead_s, usual_s)
    expected_s = overhead_s + (usual_s - overhead_s) * wire_bytes / size
    return time_s < _AS_BEFORE * expected_s


def _restarted(links: link.LinkState, samples: meter.Samples) -> link.LinkState:
    """The alarm, as if these had been its only samples."""
    return link.LinkState(
        samples[-link.WINDOW_STEPS :], overhead_s=links.overhead_s, seen=links.seen
    )


def _costs(
    state: NetworkState, seen: _Seen, is_dense: bool
) -> tuple[float | None, float | None, float]:
    """Seconds per byte of dense and of pruned exchanges, None if from another network; factor."""
    dense_cost, pruned_cost = state.dense_cost, state.pruned_cost
    if seen.changed is not None:
        dense_cost = pruned_cost = None
    factor = state.dense_factor
    if seen.reading.samples >= _COST_STEPS:
        if is_dense:
            dense_cost = seen.reading.seconds_per_byte
        else:
            pruned_cost = seen.reading.seconds_per_byte
        if dense_cost is not None and pruned_cost is not None and seen.reading.samples <= UP_STEPS:
            factor = max(_FACTOR_LEAST, min(_FACTOR_MOST, dense_cost / pruned_cost))
    return dense_cost, pruned_cost, factor


def _codec(codec: CodecTimes, k: int, time_s: float) -> CodecTimes:
    """One more time. Another k begins a new window; the old one's median is kept if it is far."""
    if not is_time(time_s) and (time_s != 0.0 or k != CHUNK_NUMEL):  # dense warm-up has none
        return codec
    if k == CHUNK_NUMEL:
        return codec._replace(dense_s=(*codec.dense_s, time_s)[-CODEC_WINDOW_STEPS:])
    if codec.k and not _are_near(k, codec.k, _CODEC_SPREAD):
        left = (codec.k, median(codec.times_s))
        is_kept = codec.other is None or not _are_near(k, codec.k, _CODEC_FAR)
        codec = codec._replace(k=k, times_s=(), other=left if is_kept else codec.other)
    times_s = keep_last(codec.times_s, time_s, CODEC_WINDOW_STEPS)
    return codec._replace(k=codec.k or k, times_s=times_s)


def _are_near(k: int, other_k: int, factor: float) -> bool:
    return 1.0 / factor < k / other_k < factor


def _codec_line(codec: CodecTimes) -> tuple[float, float]:
    """Seconds of the codec whatever k, and on top for every kept element per chunk."""
    if not codec.times_s:
        return 0.0, 0.0
    k, time_s = codec.k, median(codec.times_s)
    other_k, other_s = codec.other or (k, time_s)
    if _are_near(k, other_k, _SIZE_SPREAD):
        return time_s, 0.0
    per_k_s = max(0.0, min((time_s - other_s) / (k - other_k), time_s / k))
    return time_s - per_k_s * k, per_k_s


def _sizes(
    sizes: tuple[tuple[int, int], ...], k: int, wire_bytes: int
) -> tuple[tuple[int, int], ...]:
    """The newest size, and the last one whose k was far enough from it to draw a line."""
    for other in sizes:
        if not _are_near(other[0], k, _SIZE_SPREAD):
            return ((k, wire_bytes), other)
    return ((k, wire_bytes),)


def prices_of(
    config: GradientPruningConfig, net: Net, computes_s: tuple[float, ...]
) -> Prices | None:
    """What things cost now; None while something is unknown."""
    reading, state = net.reading, net.state
    if reading is None or not computes_s or not state.sizes:
        return None
    ordered = sorted(computes_s)
    quarter = len(ordered) // 4
    spread_s = 0.0
    if config.step_time_budget_s is not None:
        # The lower half alone: stragglers, which no density helps, sit in the upper one.
        spread_s = (ordered[len(ordered) // 2] - ordered[quarter]) / _QUARTILE
    fixed_bytes, bytes_per_k = line_through(state.sizes)
    codec_s, codec_per_k_s = _codec_line(state.codec)
    cost, factor = reading.seconds_per_byte, state.dense_factor
    if state.is_dense:
        cost /= factor
    elif state.dense_cost is not None:  # measured on the network as it is: better than a factor
        factor = state.dense_cost / cost
    return Prices(
        compute_s=ordered[len(ordered) // 2],
        spread_s=spread_s,
        codec_s=codec_s,
        codec_per_k_s=codec_per_k_s,
        dense_codec_s=median(state.codec.dense_s) if state.codec.dense_s else 0.0,
        overhead_s=reading.overhead_s,
        seconds_per_byte=cost,
        noise=reading.noise,
        fixed_bytes=fixed_bytes,
        bytes_per_k=bytes_per_k,
        dense_bytes=float(state.dense_bytes),
        dense_factor=factor,
    )
