"""P(t), the learning performance: how far the loss fell over a window, against its spread there.

With L(t) the training loss of step t and M the window size:

- `literal`: P(t) = (L(t-M) - L(t)) / (mean - min)
- `edge`: P(t) = (mean of L(t-M) .. L(t-M+w-1) - mean of L(t-w+1) .. L(t)) / (mean - min)

where w = M // 4, and mean and min run over the last M losses, L(t-M+1) .. L(t). Both edges of
`edge` are taken from the same M+1 losses that `literal` uses, so with w = 1 (M below 8) the two are
one formula. The noise of `edge` is sqrt(w) times less: 0.10 against 0.54 on a plateau at M = 128.

The formula was published only as an image that is lost. This is a reconstruction from the terms
that the surrounding text defines: the loss now, the loss a window ago, the moving average over the
window, the minimum in it, and the deviation between the last two. It is dimensionless, and does not
change when the loss is scaled or shifted.

**Noise.** On a plateau with losses of standard deviation s, independent from step to step, the
numerator has variance 2 s^2 / w (literal: 2 s^2) and the denominator is about s times the expected
largest of M standard normal numbers, e(M). So P has the standard deviation

    sqrt(2 / w) / e(M)        0.23, 0.15, 0.09, 0.06 at M = 32, 64, 128, 256 (edge)

whatever s is. `noise` computes it. A law that wants few false alarms sets its tolerance in
multiples of it, so one tolerance serves every M. Losses that are correlated over steps have more.

**A change of density inside the window** mixes two regimes: P then compares losses before with
losses after. That is right for finding a loss of quality, and wrong for judging whether a change
helped. For that `recent` takes the newest losses alone, as a smaller window with its own noise.

**Rare exchanges.** Islands tell one loss per exchange, the mean over its steps. The window is meant
in steps, so it holds fewer of them then (`GradientPruningConfig.window_losses`).

A clean linear descent gives 2M/(M-1) (literal) or 2(M+1-w)/(M-1) (edge): near 2 and 1.5 for a large
M. A plateau gives 0, plus or minus noise, whatever the loss's own noise. A rise is negative.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple, TypeAlias

from ds_gradprune.law.arithmetic import log
from ds_gradprune.law.stats import Within, clamp

Form: TypeAlias = Literal["edge", "literal"]

PERFORMANCE_LIMIT = 10.0
"""P is clamped to plus or minus this: beyond it the number says nothing more."""

LOSS_LIMIT = 1e100
"""A loss beyond it is as good as infinite; sums of M of them stay finite."""

_EULER = 0.5772156649015329

_FLAT = 1e-6
"""A spread (mean - min) below this share of max(1, |mean|) is rounding, not descent."""


class LossWindow(NamedTuple):
    """The newest losses.

    Attributes:
        losses: the last M+1 usable ones at most, oldest first.
    """

    losses: tuple[Annotated[float, Within(-LOSS_LIMIT, LOSS_LIMIT)], ...] = ()


def is_usable(loss: float | None) -> bool:
    """Whether a loss may enter the window: known, finite, and no astronomical number."""
    return loss is not None and abs(loss) <= LOSS_LIMIT  # False for nan, too


def observe(
    window: LossWindow,
    loss: float | None,
    *,
    window_size: int,
    form: Form,
    most: int | None = None,
) -> tuple[LossWindow, float | None]:
    """Take in one step's loss.

    Args:
        window: the losses before the exchange.
        loss: that of its steps, mean over micro-steps and ranks. None or a value that is not usable
            does not enter the window; P then comes from the losses that are there.
        window_size: M, >= 4.
        form: which formula.
        most: the window keeps so many losses and one; None: M and one.

    Returns:
        The window after the step, and P(t) in [-10, 10], or None while fewer than M+1 losses are
        known. P is 0 where mean - min is below 1e-6 * max(1, |mean|).
    """
    if loss is not None and is_usable(loss):
        window = LossWindow((*window.losses[-(most or window_size) :], loss))
    return window, recent(window, window_size + 1, form=form)


def recent(window: LossWindow, numel: int, *, form: Form) -> float | None:
    """P of the newest losses alone, as if M were `numel` - 1.

    Args:
        window: the losses.
        numel: how many of them, >= 5.
        form: which formula.

    Returns:
        P as `observe` gives it; None while fewer losses are known.
    """
    if len(window.losses) < numel:
        return None
    return _performance(window.losses[-numel:], _edge_numel(numel - 1, form))


def noise(window_size: int, form: Form) -> float:
    """Standard deviation of P on a plateau with independent normal losses.

    Args:
        window_size: M, >= 4.
        form: which formula.

    Returns:
        sqrt(2 / w) / e(M), with e(M) by the extreme-value expansion of the largest of M normals.

    References:
        H. A. David, H. N. Nagaraja: Order Statistics. Wiley 2003, section 10.5.
    """
    root = math.sqrt(2.0 * log(window_size))
    largest = root - (log(log(window_size)) + log(4.0 * math.pi)) / (2.0 * root)
    return math.sqrt(2.0 / _edge_numel(window_size, form)) / (largest + _EULER / root)


def _edge_numel(window_size: int, form: Form) -> int:
    return window_size // 4 if form == "edge" else 1


def _performance(losses: tuple[float, ...], edge_numel: int) -> float:
    """P of exactly M+1 losses. fsum: the same bits on every Python version, so on every rank."""
    window = losses[1:]
    mean = math.fsum(window) / len(window)
    spread = mean - min(window)
    if spread < _FLAT or spread < _FLAT * abs(mean):
        return 0.0
    fall = (math.fsum(losses[:edge_numel]) - math.fsum(losses[-edge_numel:])) / edge_numel
    return clamp(fall / spread, -PERFORMANCE_LIMIT, PERFORMANCE_LIMIT)
