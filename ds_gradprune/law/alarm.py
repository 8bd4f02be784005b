"""Has the network changed? An alarm within two or three exchanges, and the fixed overhead.

The model of one exchange: seconds = overhead + seconds_per_byte * bytes.

**Change or density?** A move of the density changes the bytes by up to 50 times, and a fixed
overhead then moves seconds / bytes although the network is the same. So nothing is extrapolated: if
B0 bytes took t0, then at the same rate B bytes take between t0 (all of t0 was overhead) and
t0 * B / B0 (none was). A new sample is compared with the samples most similar in size, and only
what lies outside that range deviates. At equal sizes the range is a point; after a jump in bytes it
is wide until three samples of the new size are there.

**Change or stall?** A two-sided CUSUM on the log of the deviation, clipped to +-1, with drift 0.15
and alarm 1.2 (faster: 0.9): one bad step is never enough. But single steps stall by 2 to 4 times,
sometimes two in a row. So the alarm also wants three deviating samples in a row, or two that are
beyond a stall (slower) or beyond noise (faster: nothing makes a step fast by chance). Where most of
an exchange is wire time, 2 times is seen in three steps, 5 times and more in two. On alarm the
window is cleared and re-estimated from the samples that raised it.

**Overhead.** The line through the medians at two sizes at least twice apart, both seen lately on
this network. Until there are two it counts as 0, which predicts a larger exchange too dear, never
too cheap. What a byte costs is measured in `link_cost`, with more patience.

Not seen: a change that moves the time of an exchange by less than a third or so (the medians follow
it silently); one that comes within a step or two of a jump in bytes and stays inside its range.
Three stalls in a row are taken for a change.

References: E. S. Page, "Continuous inspection schemes", Biometrika 41, 1954 (CUSUM). The constants
come from simulated links with a fixed overhead, 5 to 10 % noise and 2 % stalls, which
tests/law/test_alarm.py repeats.
"""

from __future__ import annotations

import functools
from typing import Annotated, NamedTuple

from ds_gradprune.law.arithmetic import log
from ds_gradprune.law.stats import (
    Bytes,
    Change,
    Count,
    Samples,
    Seconds,
    Within,
    clamp,
    is_time,
    median,
)

WINDOW_STEPS = 12
"""Exchanges that a new one is compared with: a median of 12 stands five outliers."""

_CLIP, _DRIFT = 1.0, 0.15
_ALARM_SLOWER, _ALARM_FASTER = 1.2, 0.9
"""CUSUM on natural logs: 2 times counts 0.69. Stalls make steps slow, nothing makes them fast."""

_NOTABLE = 0.3
"""A log deviation that counts towards a row: 1.35 times, three sigma of 10 % noise."""

_BEYOND_STALL = log(4.1)
"""Two samples in a row this slow are no stalls."""

_BEYOND_NOISE = log(1.5)
"""Two samples in a row this fast are no noise."""

_SIMILAR = 1.1
"""Sizes within this factor are one size."""

_SIZE_CLASS = log(1.25)
"""Sizes are remembered for the overhead on a grid of this factor."""

_MIN_SPREAD = 2.0
"""Two sizes closer than this say nothing about the overhead."""

_MEMORY_STEPS = 128
"""A size not seen for so many samples no longer bears on the overhead."""

_REVISE_STEPS = 4
"""The median at a size is renewed after so many samples."""

_MAX_OVERHEAD_SHARE = 0.5
"""At most this share of either time is taken off as overhead before two times are compared: the
noise of the rest grows by its inverse at most."""

Overhead = Annotated[float, Within(0.0, 1e9)]
"""Seconds of an exchange whatever its size."""


class SizeMedian(NamedTuple):
    """What exchanges of about one size took.

    Attributes:
        size_class: which class of the grid, log(bytes) / log(1.25) rounded.
        wire_bytes: bytes of the last exchange that counted.
        time_s: median seconds.
        seen: value of `AlarmState.seen` when it was last updated.
    """

    size_class: int
    wire_bytes: Bytes
    time_s: Seconds
    seen: Count


class AlarmState(NamedTuple):
    """Everything the alarm remembers.

    Attributes:
        samples: last WINDOW_STEPS (bytes, seconds) since the last change, oldest first.
        sizes: medians of the sizes seen since the last change, one per size class.
        overhead_s: overhead of the last fit; 0.0 before the first.
        seen: samples taken in so far.
        slower: CUSUM towards slower.
        faster: CUSUM towards faster.
        row: length of the row of notable deviations up to the newest sample; negative: faster.
        row_least: smallest log deviation in that row, without its sign; 0.0 when there is no row.
    """

    samples: Samples = ()
    sizes: tuple[SizeMedian, ...] = ()
    overhead_s: Overhead = 0.0
    seen: Count = 0
    slower: Annotated[float, Within(0.0)] = 0.0
    faster: Annotated[float, Within(0.0)] = 0.0
    row: Annotated[int, Within(-WINDOW_STEPS, WINDOW_STEPS)] = 0
    row_least: Annotated[float, Within(0.0)] = 0.0


def watch(
    state: AlarmState, time_s: float | None, wire_bytes: int
) -> tuple[AlarmState, Change | None]:
    """Take in one exchange.

    Args:
        state: what is known so far.
        time_s: what the exchange took, seconds. None, or nothing that a clock can have measured:
            ignored.
        wire_bytes: bytes one rank sent in it. 0: ignored.

    Returns:
        The new state, and which way the network has changed if the alarm was raised.
    """
    if not is_time(time_s) or wire_bytes <= 0:
        return state, None
    state = _judge(state, time_s, wire_bytes)
    change = _alarm(state)
    if change is not None:
        return restart(state, state.samples[-abs(state.row) :]), change
    return _fit(state, wire_bytes) if state.row == 0 else state, None


def restart(state: AlarmState, samples: Samples = ()) -> AlarmState:
    """The state as if these had been its only samples; the overhead stays."""
    return AlarmState(samples[-WINDOW_STEPS:], overhead_s=state.overhead_s, seen=state.seen)


def _judge(state: AlarmState, time_s: float, wire_bytes: int) -> AlarmState:
    """Append the sample; move the CUSUMs and the row."""
    whole, net = _deviation(state, time_s, wire_bytes)
    step = clamp(net, -_CLIP, _CLIP)
    row, row_least = 0, 0.0
    if abs(whole) > _NOTABLE:
        goes_on = state.row * whole > 0.0
        row = (state.row if goes_on else 0) + (1 if whole > 0.0 else -1)
        row_least = min(state.row_least, abs(whole)) if goes_on else abs(whole)
    samples = (*state.samples, (wire_bytes, time_s))[-WINDOW_STEPS:]
    slower, faster = state.slower + step - _DRIFT, state.faster - step - _DRIFT
    return AlarmState(
        samples,
        state.sizes,
        state.overhead_s,
        state.seen + 1,
        slower if slower > 0.0 else 0.0,
        faster if faster > 0.0 else 0.0,
        row,
        row_least,
    )


def _deviation(state: AlarmState, time_s: float, wire_bytes: int) -> tuple[float, float]:
    """Log of the time over what the same network could have taken; 0.0 inside that range.

    Returns:
        Of the whole times, and of the times less the overhead. Noise and stalls are in the whole;
        the network's rate is in the rest.
    """
    if not state.samples:
        return 0.0, 0.0
    least_s, most_s = _expected(state, wire_bytes)
    if least_s <= time_s <= most_s:
        return 0.0, 0.0
    reference_s = least_s if time_s < least_s else most_s
    whole = log(time_s / reference_s)
    if state.overhead_s == 0.0:
        return whole, whole
    shorter_s = time_s if time_s < reference_s else reference_s
    overhead_s = min(state.overhead_s, _MAX_OVERHEAD_SHARE * shorter_s)
    return whole, log((time_s - overhead_s) / (reference_s - overhead_s))


def _expected(state: AlarmState, wire_bytes: int) -> tuple[float, float]:
    """Least and most seconds for so many bytes, from the samples most similar in size.

    Samples of the row that is under way do not vote while three others can.
    """
    settled = state.samples[: len(state.samples) - abs(state.row)]
    same = sorted([time_s for size, time_s in settled if size == wire_bytes])
    if len(same) > 3:
        middle_s = same[(len(same) - 1) // 2]
        return middle_s, middle_s
    voters = _similar(settled, wire_bytes)
    if len(voters) < 3:
        voters = _similar(state.samples, wire_bytes)
    scaled = [(time_s, time_s * wire_bytes / size) for size, time_s in voters]
    low = sorted(min(pair) for pair in scaled)
    high = sorted(max(pair) for pair in scaled)
    middle = (len(scaled) - 1) // 2
    # Two stalls among three samples would make the network look faster ever after: take the least.
    return low[middle if len(low) > 3 else 0], high[middle]


def _similar(samples: Samples, wire_bytes: int) -> Samples:
    """The three samples nearest in size, and all others about as near."""
    if not samples:
        return ()
    factors = [max(size, wire_bytes) / min(size, wire_bytes) for size, _ in samples]
    limit = sorted(factors)[min(2, len(factors) - 1)] * _SIMILAR
    return tuple(s for s, factor in zip(samples, factors, strict=True) if factor <= limit)


def _alarm(state: AlarmState) -> Change | None:
    row, least = state.row, state.row_least
    if state.slower > _ALARM_SLOWER and (row >= 3 or (row == 2 and least > _BEYOND_STALL)):
        return "slower"
    if state.faster > _ALARM_FASTER and (row <= -3 or (row == -2 and least > _BEYOND_NOISE)):
        return "faster"
    return None


@functools.lru_cache(maxsize=64)
def _class_of(wire_bytes: int) -> int:
    return round(log(wire_bytes) / _SIZE_CLASS)


def _fit(state: AlarmState, wire_bytes: int) -> AlarmState:
    """Remember the median at this size; the overhead from two sizes far enough apart."""
    size_class = _class_of(wire_bytes)
    for size in state.sizes:
        if size.size_class == size_class and state.seen - size.seen < _REVISE_STEPS:
            return state
    times_s: list[float] = []
    least, most = wire_bytes / _SIMILAR, wire_bytes * _SIMILAR
    for size_bytes, time_s in reversed(state.samples):
        if not least <= size_bytes <= most:
            break
        times_s.append(time_s)
    if len(times_s) < 3:
        return state
    sizes = [
        size
        for size in state.sizes
        if size.size_class != size_class and state.seen - size.seen <= _MEMORY_STEPS
    ]
    sizes.append(SizeMedian(size_class, wire_bytes, median(times_s), state.seen))
    overhead_s = state.overhead_s if len(sizes) == 1 else _overhead_s(state.overhead_s, sizes)
    return state._replace(sizes=tuple(sizes), overhead_s=overhead_s)


def _overhead_s(known_s: float, sizes: list[SizeMedian]) -> float:
    """The overhead by the line through the smallest and the largest size, or what was known."""
    small = min(sizes, key=lambda size: size.wire_bytes)
    large = max(sizes, key=lambda size: size.wire_bytes)
    if large.wire_bytes < _MIN_SPREAD * small.wire_bytes:
        return known_s
    slope = (large.time_s - small.time_s) / (large.wire_bytes - small.wire_bytes)
    return clamp(small.time_s - slope * small.wire_bytes, 0.0, small.time_s)
