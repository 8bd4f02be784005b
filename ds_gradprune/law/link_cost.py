"""What an exchange costs now and how steady that is. Pure: state in, state out.

`link` raises the alarm when the network has changed by a lot within two or three exchanges; this
module answers the questions that need patience. The model of one exchange is the same:
seconds = overhead + seconds_per_byte * bytes, the overhead being link's.

**Cost.** The median of seconds per byte over the exchanges since the last change, 32 at most, and
of those only the ones about as large as the newest: nothing is averaged over sizes for which an
overhead that is a little wrong means different things.

**Noise.** The standard deviation of one exchange's logarithm, from the differences of one exchange
and the next, which neither a change nor a drift of the network inflates, as deviations from a mean
would be. They are clipped: a stall counts as 2.5 of them at most. (J. von Neumann et al.: The mean
square successive difference. Annals of Mathematical Statistics 12, 1941.)

**Drift.** A change by a fifth or a third stays below link's alarm. A two-sided CUSUM on deviations
in units of the noise, clipped to 4, with drift 0.5 and alarm 12: it sees a change of four standard
deviations in four or five exchanges and of two in about nine, three stalls close together are not
enough, and the mean time between false alarms is exp(2 * 0.5 * (12 + 1.2)), 500,000 exchanges (D.
Siegmund, Sequential Analysis, Springer 1985, equation 2.57). On alarm the exchanges from before the
CUSUM's rise are forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ds_gradprune.errors import CheckpointError

Drift = Literal["slower", "faster"]
Samples = tuple[tuple[int, float], ...]

WINDOW_STEPS = 32
"""Exchanges behind the cost: their median has a fifth of the noise of one."""

_SIMILAR = 1.25
"""Sizes within this factor count as one size."""

_CLIP, _SLACK, _ALARM = 4.0, 0.5, 12.0
"""CUSUM of the drift, in units of the noise."""

_KNOWN_STEPS = 6
"""Exchanges of one size before a deviation from them means anything."""

_NOISE_START, _NOISE_LEAST, _NOISE_MOST = 0.08, 0.01, 0.25
_NOISE_GAIN, _NOISE_PRIOR = 0.005, 8
"""The noise is a mean over all exchanges, its start counting as 8 of them, and over the last two
hundred or so when there are more."""

_NORMAL = 0.8862
"""Standard deviation over the mean absolute difference of two normal numbers: sqrt(pi) / 2."""

_OVERHEAD_MOST = 0.25
"""Of an exchange's time at most this share counts as overhead: its error grows with every byte that
is added, and too little of it predicts a larger exchange too dear, never too cheap."""


class MeterState(NamedTuple):
    """Everything the meter remembers.

    Attributes:
        samples: the last WINDOW_STEPS (bytes, seconds) since the last change, oldest first.
        noise: standard deviation of the logarithm of one exchange's time.
        noise_numel: differences behind it.
        slower: CUSUM towards slower.
        faster: CUSUM towards faster.
        slower_steps: exchanges since `slower` was 0.
        faster_steps: exchanges since `faster` was 0.
    """

    samples: Samples = ()
    noise: float = _NOISE_START
    noise_numel: int = 0
    slower: float = 0.0
    faster: float = 0.0
    slower_steps: int = 0
    faster_steps: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` restores an equal state."""
        return {
            "samples": [list(sample) for sample in self.samples],
            "noise": self.noise,
            "noise_numel": self.noise_numel,
            "slower": self.slower,
            "faster": self.faster,
            "slower_steps": self.slower_steps,
            "faster_steps": self.faster_steps,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MeterState:
        """The state that `to_json` wrote.

        Raises:
            CheckpointError: the data is not such a state.
        """
        try:
            return cls(
                samples=tuple((int(size), float(time_s)) for size, time_s in data["samples"]),
                noise=float(data["noise"]),
                noise_numel=int(data["noise_numel"]),
                slower=float(data["slower"]),
                faster=float(data["faster"]),
                slower_steps=int(data["slower_steps"]),
                faster_steps=int(data["faster_steps"]),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise CheckpointError(f"meter must be a saved meter state, got {data!r}.") from exc


class Reading(NamedTuple):
    """What the meter says now.

    Attributes:
        overhead_s: of an exchange, whatever its size, seconds.
        seconds_per_byte: on top of it.
        noise: standard deviation of the logarithm of one exchange's time.
        samples: how many exchanges of about this size stand behind it.
        drift: the newest exchange raised the alarm, and which way.
    """

    overhead_s: float
    seconds_per_byte: float
    noise: float
    samples: int
    drift: Drift | None

    def predict_s(self, wire_bytes: float) -> float:
        """Seconds that an exchange of so many bytes would take."""
        return self.overhead_s + self.seconds_per_byte * wire_bytes


def observe(
    state: MeterState, time_s: float, wire_bytes: int, *, overhead_s: float, keep: int | None = None
) -> tuple[MeterState, Reading]:
    """Take in one exchange.

    Args:
        state: what is known so far.
        time_s: what the exchange took, seconds, > 0.
        wire_bytes: bytes one rank sent in it, > 0.
        overhead_s: what link knows of the overhead.
        keep: link raised the alarm with this exchange, and only so many newest ones, this one
            included, are of the network as it is now; None: no alarm.

    Returns:
        The new state and the reading from it.
    """
    noise, numel = _noise(state, time_s, wire_bytes)
    samples = (*state.samples, (wire_bytes, time_s))[-WINDOW_STEPS:]
    if keep is not None:
        state = MeterState(samples[-max(1, keep) :], noise, numel)
        return state, _read(state, overhead_s, None)
    rates = _rates(samples, wire_bytes)
    slower, faster = state.slower, state.faster
    drift: Drift | None = None
    slower_steps, faster_steps = state.slower_steps, state.faster_steps
    if len(rates) > _KNOWN_STEPS:
        z = math.log(time_s / (_middle(rates) * wire_bytes)) / noise
        z = max(-_CLIP, min(_CLIP, z))
        slower, faster = max(0.0, slower + z - _SLACK), max(0.0, faster - z - _SLACK)
        slower_steps = slower_steps + 1 if slower else 0
        faster_steps = faster_steps + 1 if faster else 0
        if slower > _ALARM:
            drift, rise = "slower", slower_steps
        elif faster > _ALARM:
            drift, rise = "faster", faster_steps
    if drift is not None:
        state = MeterState(samples[-rise:], noise, numel)
        return state, _read(state, overhead_s, drift)
    state = MeterState(samples, noise, numel, slower, faster, slower_steps, faster_steps)
    return state, _reading(rates, wire_bytes, overhead_s, noise, None)


def go_back(state: MeterState, former: Samples, overhead_s: float) -> tuple[MeterState, Reading]:
    """The change was none: the newest two exchanges are as those from before it were.

    Args:
        state: what is known since the change.
        former: samples from before it, at least one.
        overhead_s: what link knows of the overhead.

    Returns:
        The state with both, and the reading at the size of the former ones.
    """
    samples = (*former, *state.samples[-2:])[-WINDOW_STEPS:]
    state = MeterState(samples, state.noise, state.noise_numel)
    size = former[-1][0]
    return state, _reading(_rates(samples, size), size, overhead_s, state.noise, None)


def _noise(state: MeterState, time_s: float, wire_bytes: int) -> tuple[float, int]:
    """The noise after one more exchange, if it is about as large as the one before."""
    if not state.samples:
        return state.noise, state.noise_numel
    size, before_s = state.samples[-1]
    if not size / _SIMILAR <= wire_bytes <= size * _SIMILAR:
        return state.noise, state.noise_numel
    step = _NORMAL * abs(math.log(time_s * size / (before_s * wire_bytes)))
    gain = max(_NOISE_GAIN, 1.0 / (state.noise_numel + 1 + _NOISE_PRIOR))
    noise = state.noise + gain * (min(step, 2.5 * state.noise) - state.noise)
    return max(_NOISE_LEAST, min(_NOISE_MOST, noise)), state.noise_numel + 1


def _read(state: MeterState, overhead_s: float, drift: Drift | None) -> Reading:
    newest = state.samples[-1][0]
    return _reading(_rates(state.samples, newest), newest, overhead_s, state.noise, drift)


def _reading(
    rates: list[float], wire_bytes: int, overhead_s: float, noise: float, drift: Drift | None
) -> Reading:
    whole = _middle(rates)
    overhead_s = min(overhead_s, _OVERHEAD_MOST * whole * wire_bytes)
    return Reading(overhead_s, whole - overhead_s / wire_bytes, noise, len(rates), drift)


def _rates(samples: Samples, wire_bytes: int) -> list[float]:
    """Seconds over bytes of the exchanges about as large as `wire_bytes`, in rising order."""
    least, most = wire_bytes / _SIMILAR, wire_bytes * _SIMILAR
    return sorted([time_s / size for size, time_s in samples if least <= size <= most])


def _middle(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])
