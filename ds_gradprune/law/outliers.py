"""Losses that leap out of their series, up or down, and what enters the window in their place.

One bad batch is no trend, so P(t) should not see it. A loss leaps where it lies more than 6 robust
standard deviations (1.4826 times the median absolute deviation) from the median of the last 64.

- Up: it enters as that bound. Many of them still are a trend, and each is told, since the arm then
  prunes no harder for a few steps.
- Down: it enters as the lowest loss that did not leap. P divides by mean - min, so a single low
  loss, as of a step with fewer micro-batches, would hide a rise for a whole window.

A real descent is not held back for long. Where 4 of 8 losses leap down, the loss is there: from the
fourth on they enter as they are. A descent that is steady, or steep from the first step on, widens
the deviation itself and is never clipped.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

from ds_gradprune.law.stats import Within

_FAR = 6.0 * 1.4826
"""Median absolute deviations; 1.4826 of them are a standard deviation of a normal number."""

_NUMEL, _NUMEL_LEAST = 64, 16
"""Losses behind the median, and how many it takes."""

_ROUNDING = 1e-6
"""Deviation of a series that does not scatter, as a share of its median."""

_MEMORY, _MOST_LOW = 8, 4
"""Where so many of the last 8 losses leap down, they are no outliers."""

_ALL_LOW = 2**_MEMORY - 1

Lows = Annotated[int, Within(0, _ALL_LOW)]
"""Which of the last 8 losses leapt down, one bit each, the newest lowest."""


class Clipped(NamedTuple):
    """A loss as it enters the window.

    Attributes:
        loss: what enters; the loss itself unless it leapt.
        leapt_up: it leapt up.
        lows: for the next call.
    """

    loss: float
    leapt_up: bool
    lows: int


def clip(losses: tuple[float, ...], lows: int, loss: float) -> Clipped:
    """Find what enters the window for the newest loss.

    Args:
        losses: those in the window before it, oldest first.
        lows: what the last call returned; 0 at first.
        loss: the newest one; what is not finite is returned as it is.
    """
    before = losses[-_NUMEL:]
    numel = len(before)
    if numel < _NUMEL_LEAST or not math.isfinite(loss):
        return Clipped(loss, False, lows)
    lows = lows << 1 & _ALL_LOW
    ordered = sorted(before)
    half, quarter = numel // 2, numel // 4
    middle = ordered[half]
    # Of the losses at most half lie between the two quartiles. So the median deviation is at least
    # that of the nearer one, and most losses need no other bound.
    near = _FAR * min(middle - ordered[half - quarter], ordered[half + quarter] - middle)
    if middle - near <= loss and (loss <= ordered[-1] or loss <= middle + near):
        return Clipped(loss, False, lows)
    deviations = sorted([abs(x - middle) for x in ordered])  # two runs, which sort fast
    reach = _FAR * max(deviations[half], _ROUNDING * abs(middle))
    if loss > middle:
        # A loss that rises steadily in small steps leaves its median behind, and does not leap.
        bound = max(middle + reach, ordered[-1])
        return Clipped(min(loss, bound), loss > bound, lows)
    if loss >= middle - reach:
        return Clipped(loss, False, lows)
    lows |= 1
    if lows.bit_count() >= _MOST_LOW:
        return Clipped(loss, False, lows)
    return Clipped(next(x for x in ordered if x >= middle - reach), False, lows)
