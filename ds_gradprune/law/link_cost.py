"""What an exchange costs now, how steady that is, and whether it drifts.

`alarm` tells within two or three exchanges that the network has changed by a lot; this module
answers the questions that need patience. The model of one exchange is the same:
seconds = overhead + seconds_per_byte * bytes, the overhead being the alarm's.

**Cost.** The median of seconds per byte over the exchanges since the last change, 32 at most, and
of those only the ones about as large as the newest: nothing is averaged over sizes for which an
overhead that is a little wrong means different things.

**Noise.** The standard deviation of one exchange's logarithm, from the differences of one exchange
and the next, which neither a change nor a drift of the network inflates, as deviations from a mean
would be. They are clipped: a stall counts as 2.5 of them at most. (J. von Neumann et al.: The mean
square successive difference. Annals of Mathematical Statistics 12, 1941.)

**Drift.** A change by a fifth or a third stays below the alarm. A two-sided CUSUM on deviations
in units of the noise, clipped to 4, with drift 0.5 and alarm 12: it sees a change of four standard
deviations in four or five exchanges and of two in about nine, three stalls close together are not
enough, and the mean time between false alarms is exp(2 * 0.5 * (12 + 1.2)), 500,000 exchanges (D.
Siegmund, Sequential Analysis, Springer 1985, equation 2.57). On alarm the exchanges from before the
CUSUM's rise are forgotten.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

from ds_gradprune.law.arithmetic import log
from ds_gradprune.law.stats import Change, Count, Samples, Within, clamp, median

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

_NOISE_CLIP = 2.5
"""A difference counts as so many times the noise at most."""

_NORMAL = 0.8862
"""Standard deviation over the mean absolute difference of two normal numbers: sqrt(pi) / 2."""

_OVERHEAD_MOST = 0.25
"""Of an exchange's time at most this share counts as overhead: its error grows with every byte that
is added, and too little of it predicts a larger exchange too dear, never too cheap."""


class Cusum(NamedTuple):
    """A one-sided CUSUM of deviations, in units of the noise.

    Attributes:
        height: its value; an alarm beyond 12.
        steps: exchanges since it was 0.
    """

    height: Annotated[float, Within(0.0)] = 0.0
    steps: Count = 0

    def after(self, deviation: float) -> Cusum:
        """With one more deviation in its direction."""
        height = self.height + deviation - _SLACK
        return Cusum(height, self.steps + 1) if height > 0.0 else _CALM


_CALM = Cusum()


class LinkCostState(NamedTuple):
    """Everything that is remembered of the exchanges.

    Attributes:
        samples: the last WINDOW_STEPS (bytes, seconds) since the last change, oldest first.
        noise: standard deviation of the logarithm of one exchange's time.
        noise_numel: differences behind it.
        slower: towards slower.
        faster: towards faster.
    """

    samples: Samples = ()
    noise: Annotated[float, Within(_NOISE_LEAST, _NOISE_MOST)] = _NOISE_START
    noise_numel: Count = 0
    slower: Cusum = Cusum()
    faster: Cusum = Cusum()


class LinkCost(NamedTuple):
    """What an exchange costs now.

    Attributes:
        overhead_s: of an exchange, whatever its size, seconds.
        seconds_per_byte: on top of it.
        noise: standard deviation of the logarithm of one exchange's time.
        samples: how many exchanges of about this size stand behind it.
        drift: the newest exchange raised the alarm of the drift, and which way.
    """

    overhead_s: float
    seconds_per_byte: float
    noise: float
    samples: int
    drift: Change | None = None


def observe(
    state: LinkCostState,
    time_s: float,
    wire_bytes: int,
    *,
    overhead_s: float,
    keep: int | None = None,
) -> tuple[LinkCostState, LinkCost]:
    """Take in one exchange.

    Args:
        state: what is known so far.
        time_s: what the exchange took, seconds, > 0.
        wire_bytes: bytes one rank sent in it, > 0.
        overhead_s: what the alarm knows of the overhead.
        keep: the alarm was raised with this exchange, and only so many newest ones, this one
            included, are of the network as it is now; None: no alarm.

    Returns:
        The new state and the cost from it.
    """
    noise, numel = _noise(state, time_s, wire_bytes)
    samples = (*state.samples, (wire_bytes, time_s))[-WINDOW_STEPS:]
    if keep is not None:
        samples = samples[-max(1, keep) :]
        cost = _cost(_typical(samples, wire_bytes), wire_bytes, overhead_s, noise)
        return LinkCostState(samples, noise, numel), cost
    typical = _typical(samples, wire_bytes)
    slower, faster = state.slower, state.faster
    whole, alike = typical
    if alike > _KNOWN_STEPS:
        deviation = log(time_s / (whole * wire_bytes)) / noise
        deviation = clamp(deviation, -_CLIP, _CLIP)
        slower, faster = slower.after(deviation), faster.after(-deviation)
    drift: Change | None = None
    if slower.height > _ALARM:
        drift, samples = "slower", samples[-slower.steps :]
    elif faster.height > _ALARM:
        drift, samples = "faster", samples[-faster.steps :]
    if drift is not None:
        slower = faster = Cusum()
        typical = _typical(samples, wire_bytes)
    state = LinkCostState(samples, noise, numel, slower, faster)
    return state, _cost(typical, wire_bytes, overhead_s, noise, drift)


def go_back(
    state: LinkCostState, former: Samples, overhead_s: float
) -> tuple[LinkCostState, LinkCost]:
    """The change was none: the newest two exchanges are as those from before it were.

    Args:
        state: what is known since the change.
        former: samples from before it, at least one.
        overhead_s: what the alarm knows of the overhead.

    Returns:
        The state with both, and the cost at the size of the former ones.
    """
    samples = (*former, *state.samples[-2:])[-WINDOW_STEPS:]
    state, size = LinkCostState(samples, state.noise, state.noise_numel), former[-1][0]
    return state, _cost(_typical(samples, size), size, overhead_s, state.noise)


def _noise(state: LinkCostState, time_s: float, wire_bytes: int) -> tuple[float, int]:
    """The noise after one more exchange, if it is about as large as the one before."""
    if not state.samples:
        return state.noise, state.noise_numel
    size, before_s = state.samples[-1]
    if not size / _SIMILAR <= wire_bytes <= size * _SIMILAR:
        return state.noise, state.noise_numel
    step = _NORMAL * abs(log(time_s * size / (before_s * wire_bytes)))
    noise, numel = state.noise, state.noise_numel + 1
    if step > _NOISE_CLIP * noise:
        step = _NOISE_CLIP * noise
    gain = max(_NOISE_GAIN, 1.0 / (numel + _NOISE_PRIOR))
    noise += gain * (step - noise)
    return clamp(noise, _NOISE_LEAST, _NOISE_MOST), numel


def _cost(
    typical: tuple[float, int],
    wire_bytes: int,
    overhead_s: float,
    noise: float,
    drift: Change | None = None,
) -> LinkCost:
    """From what is `_typical` of exchanges about as large as `wire_bytes`."""
    whole, numel = typical
    overhead_s = min(overhead_s, _OVERHEAD_MOST * whole * wire_bytes)
    return LinkCost(overhead_s, whole - overhead_s / wire_bytes, noise, numel, drift)


def _typical(samples: Samples, wire_bytes: int) -> tuple[float, int]:
    """Median of seconds over bytes of the exchanges about as large, and how many they are."""
    # Whole bounds, since comparing each size with a float would take twice as long.
    least, most = math.ceil(wire_bytes / _SIMILAR), math.floor(wire_bytes * _SIMILAR)
    rates = [time_s / size for size, time_s in samples if least <= size <= most]
    return median(rates), len(rates)
