"""What a byte costs on this link, and whether the link has changed. Pure: state in, state out.

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
too cheap.

Not seen: a change that moves the time of an exchange by less than a third or so (the medians follow
it silently); one that comes within a step or two of a jump in bytes and stays inside its range.
Three stalls in a row are taken for a change.

References: E. S. Page, "Continuous inspection schemes", Biometrika 41, 1954 (CUSUM). The constants
come from simulated links with a fixed overhead, 5 to 10 % noise and 2 % stalls, which
tests/test_link.py repeats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ds_gradprune.errors import CheckpointError

Change = Literal["slower", "faster"]
Samples = tuple[tuple[int, float], ...]

WINDOW_STEPS = 12
"""Samples behind the estimate: a median of 12 stands five outliers."""

_CLIP, _DRIFT = 1.0, 0.15
_ALARM_SLOWER, _ALARM_FASTER = 1.2, 0.9
"""CUSUM on natural logs: 2 times counts 0.69. Stalls make steps slow, nothing makes them fast."""

_NOTABLE = 0.3
"""A log deviation that counts towards a row: 1.35 times, three sigma of 10 % noise."""

_BEYOND_STALL = math.log(4.1)
"""Two samples in a row this slow are no stalls."""

_BEYOND_NOISE = math.log(1.5)
"""Two samples in a row this fast are no noise."""

_LEAST_S, _MOST_S = 1e-9, 1e9
"""No clock has measured less, no exchange lasts longer."""

_SIMILAR = 1.1
"""Sizes within this factor are one size."""

_SIZE_CLASS = math.log(1.25)
"""Sizes are remembered for the overhead on a grid of this factor."""

_MIN_SPREAD = 2.0
"""Two sizes closer than this say nothing about the overhead."""

_MEMORY_STEPS = 128
"""A size not seen for so many samples no longer bears on the overhead."""

_REVISE_STEPS = 4
"""The median at a size is renewed after so many samples."""

_MAX_FITTED_SHARE = 0.9
"""At most this share of a sample counts as overhead in the estimate of the rate."""

_MAX_OVERHEAD_SHARE = 0.5
"""At most this share of either time is taken off as overhead before two times are compared: the
noise of the rest grows by its inverse at most."""


class SizeMedian(NamedTuple):
    """What exchanges of about one size took.

    Attributes:
        size_class: which class of the grid, log(bytes) / log(1.25) rounded.
        wire_bytes: bytes of the last exchange that counted.
        time_s: median seconds.
        seen: value of `LinkState.seen` when it was last updated.
    """

    size_class: int
    wire_bytes: int
    time_s: float
    seen: int


class LinkState(NamedTuple):
    """Everything the model remembers.

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
    overhead_s: float = 0.0
    seen: int = 0
    slower: float = 0.0
    faster: float = 0.0
    row: int = 0
    row_least: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` restores an equal state."""
        return {
            "samples": [list(sample) for sample in self.samples],
            "sizes": [list(size) for size in self.sizes],
            "overhead_s": self.overhead_s,
            "seen": self.seen,
            "slower": self.slower,
            "faster": self.faster,
            "row": self.row,
            "row_least": self.row_least,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LinkState:
        """The state that `to_json` wrote.

        Raises:
            CheckpointError: the data is not such a state.
        """
        try:
            return cls(
                samples=tuple((int(size), float(time_s)) for size, time_s in data["samples"]),
                sizes=tuple(
                    SizeMedian(int(size_class), int(size), float(time_s), int(seen))
                    for size_class, size, time_s, seen in data["sizes"]
                ),
                overhead_s=float(data["overhead_s"]),
                seen=int(data["seen"]),
                slower=float(data["slower"]),
                faster=float(data["faster"]),
                row=int(data["row"]),
                row_least=float(data["row_least"]),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise CheckpointError(f"link must be a saved link state, got {data!r}.") from exc


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """What the model says now.

    Attributes:
        seconds_per_byte: median of (seconds - overhead) / bytes; None before the first sample.
        overhead_s: what an exchange costs whatever its size, seconds; 0.0 while unknown.
        changed: the newest sample raised the alarm, and which way.
    """

    seconds_per_byte: float | None
    overhead_s: float
    changed: Change | None

    def predict_s(self, wire_bytes: int) -> float | None:
        """Seconds that an exchange of so many bytes would take; None before the first sample."""
        if self.seconds_per_byte is None:
            return None
        return self.overhead_s + self.seconds_per_byte * wire_bytes


def observe(
    state: LinkState, comm_time_s: float | None, wire_bytes: int
) -> tuple[LinkState, LinkEstimate]:
    """Take in one exchange.

    Args:
        state: what is known so far.
        comm_time_s: what the exchange took, seconds. None, or nothing that a clock can have
            measured: ignored.
        wire_bytes: bytes one rank sent in it. 0: ignored.

    Returns:
        The new state and the estimate from it.
    """
    state, changed = watch(state, comm_time_s, wire_bytes)
    return state, _estimate(state, changed)


def watch(
    state: LinkState, comm_time_s: float | None, wire_bytes: int
) -> tuple[LinkState, Change | None]:
    """`observe` without the estimate: the new state, and whether the alarm was raised."""
    if comm_time_s is None or not _LEAST_S <= comm_time_s <= _MOST_S:  # nan is not, either
        return state, None
    if wire_bytes <= 0:
        return state, None
    state = _judge(state, comm_time_s, wire_bytes)
    changed = _alarm(state)
    if changed is not None:
        state = LinkState(
            samples=state.samples[-abs(state.row) :],
            overhead_s=state.overhead_s,
            seen=state.seen,
        )
    elif state.row == 0:
        state = _fit(state, wire_bytes)
    return state, changed


def _judge(state: LinkState, time_s: float, wire_bytes: int) -> LinkState:
    """Append the sample; move the CUSUMs and the row."""
    whole, net = _deviation(state, time_s, wire_bytes)
    step = max(-_CLIP, min(_CLIP, net))
    row, least = 0, 0.0
    if abs(whole) > _NOTABLE:
        goes_on = state.row * whole > 0.0
        row = (state.row if goes_on else 0) + (1 if whole > 0.0 else -1)
        least = min(state.row_least, abs(whole)) if goes_on else abs(whole)
    return LinkState(
        samples=(*state.samples, (wire_bytes, time_s))[-WINDOW_STEPS:],
        sizes=state.sizes,
        overhead_s=state.overhead_s,
        seen=state.seen + 1,
        slower=max(0.0, state.slower + step - _DRIFT),
        faster=max(0.0, state.faster - step - _DRIFT),
        row=row,
        row_least=least,
    )


def _deviation(state: LinkState, time_s: float, wire_bytes: int) -> tuple[float, float]:
    """Log of the time over what the same network could have taken; 0.0 inside that range.

    Returns:
        Of the whole times, and of the times less the overhead. Noise and stalls are in the whole;
        the network's rate is in the rest.
    """
    if not state.samples:
        return 0.0, 0.0
    least_s, most_s = _expected(state, wire_bytes)
    reference_s = min(max(time_s, least_s), most_s)
    if reference_s == time_s:
        return 0.0, 0.0
    overhead_s = min(state.overhead_s, _MAX_OVERHEAD_SHARE * min(time_s, reference_s))
    net = math.log((time_s - overhead_s) / (reference_s - overhead_s))
    return math.log(time_s / reference_s), net


def _expected(state: LinkState, wire_bytes: int) -> tuple[float, float]:
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


def _alarm(state: LinkState) -> Change | None:
    row, least = state.row, state.row_least
    if state.slower > _ALARM_SLOWER and (row >= 3 or (row == 2 and least > _BEYOND_STALL)):
        return "slower"
    if state.faster > _ALARM_FASTER and (row <= -3 or (row == -2 and least > _BEYOND_NOISE)):
        return "faster"
    return None


def _fit(state: LinkState, wire_bytes: int) -> LinkState:
    """Remember the median at this size; the overhead from two sizes far enough apart."""
    size_class = round(math.log(wire_bytes) / _SIZE_CLASS)
    for size in state.sizes:
        if size.size_class == size_class and state.seen - size.seen < _REVISE_STEPS:
            return state
    times_s = []
    for size_bytes, time_s in reversed(state.samples):
        if not wire_bytes / _SIMILAR <= size_bytes <= wire_bytes * _SIMILAR:
            break
        times_s.append(time_s)
    if len(times_s) < 3:
        return state
    sizes = [
        size
        for size in state.sizes
        if size.size_class != size_class and state.seen - size.seen <= _MEMORY_STEPS
    ]
    sizes.append(SizeMedian(size_class, wire_bytes, _median(times_s), state.seen))
    small = min(sizes, key=lambda size: size.wire_bytes)
    large = max(sizes, key=lambda size: size.wire_bytes)
    overhead_s = state.overhead_s
    if large.wire_bytes >= _MIN_SPREAD * small.wire_bytes:
        slope = (large.time_s - small.time_s) / (large.wire_bytes - small.wire_bytes)
        overhead_s = min(max(0.0, small.time_s - slope * small.wire_bytes), small.time_s)
    return state._replace(sizes=tuple(sizes), overhead_s=overhead_s)


def _estimate(state: LinkState, changed: Change | None) -> LinkEstimate:
    if not state.samples:
        return LinkEstimate(None, state.overhead_s, changed)
    overhead_s = state.overhead_s
    costs = [
        (
            time_s - overhead_s
            if time_s * _MAX_FITTED_SHARE > overhead_s
            else time_s * (1.0 - _MAX_FITTED_SHARE)
        )
        / size
        for size, time_s in state.samples
    ]
    return LinkEstimate(_median(costs), overhead_s, changed)


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])
