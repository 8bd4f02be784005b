"""P(t), the learning performance: how far the loss fell over a window, against its spread there.

Pure: state in, state out. Knows nothing of density, links or ranks; the loss it is given must
already be the mean over micro-steps and ranks, or ranks decide differently.

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
largest of M standard normal numbers, e(M): so P has the standard deviation

    sqrt(2 / w) / e(M)        0.23, 0.15, 0.09, 0.06 at M = 32, 64, 128, 256 (edge)

whatever s is. `noise` computes it; a law that wants few false alarms sets its tolerance in
multiples of it, so one tolerance serves every M. Losses that are correlated over steps have more.

**A change of density inside the window** mixes two regimes: P then compares losses before with
losses after. That is right for finding a loss of quality, and wrong for judging whether a change
helped. For that `recent` takes the newest losses alone, as a smaller window with its own noise.

A clean linear descent gives 2M/(M-1) (literal) or 2(M+1-w)/(M-1) (edge): near 2 and 1.5 for a large
M. A plateau gives 0, plus or minus noise, whatever the loss's own noise; a rise is negative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ds_gradprune.errors import CheckpointError

Form = Literal["edge", "literal"]

PERFORMANCE_LIMIT = 10.0
"""P is clamped to plus or minus this: beyond it the number says nothing more."""

_EULER = 0.5772156649015329

_FLAT = 1e-6
"""A spread (mean - min) below this share of max(1, |mean|) is rounding, not descent."""

_LOSS_LIMIT = 1e100
"""A loss beyond it is as good as infinite; sums of M of them stay finite."""


@dataclass(frozen=True, slots=True)
class PerformanceState:
    """The window.

    Attributes:
        losses: the last M+1 usable losses at most, oldest first.
    """

    losses: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` restores an equal state."""
        return {"losses": list(self.losses)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PerformanceState:
        """The state that `to_json` wrote.

        Raises:
            CheckpointError: the data is not such a state.
        """
        try:
            losses = tuple(float(loss) for loss in data["losses"])
        except (KeyError, TypeError, ValueError) as exc:
            raise CheckpointError(
                f"performance.losses must be a list of numbers, got {data!r}."
            ) from exc
        if not all(_usable(loss) for loss in losses):
            raise CheckpointError(f"performance.losses must be finite, got {list(losses)!r}.")
        return cls(losses)


def restart(state: PerformanceState) -> PerformanceState:
    """An empty window: P is unknown until M+1 new losses are seen.

    For when the losses before and after are not comparable: another data set, another window size.

    Args:
        state: the window to drop.

    Returns:
        The empty window; `state` itself if it is empty already.
    """
    return PerformanceState() if state.losses else state


def observe(
    state: PerformanceState, loss: float | None, *, window_size: int, form: Form
) -> tuple[PerformanceState, float | None]:
    """Take in one step's loss.

    Args:
        state: the window before the step.
        loss: the step's loss, mean over micro-steps and ranks. None or a value that is not finite
            does not enter the window; P then comes from the losses that are there.
        window_size: M, >= 4.
        form: which formula.

    Returns:
        The window after the step, and P(t) in [-10, 10], or None while fewer than M+1 losses are
        known. P is 0 where mean - min is below 1e-6 * max(1, |mean|).

    Raises:
        ValueError: `window_size` or `form` is not one of those above.
    """
    if window_size < 4:
        raise ValueError(f"window_size must be at least 4, got {window_size!r}.")
    if form not in ("edge", "literal"):
        raise ValueError(f'form must be "edge" or "literal", got {form!r}.')
    losses = state.losses
    if loss is not None and _usable(loss):
        losses = (*losses, float(loss))[-(window_size + 1) :]
        state = PerformanceState(losses)
    if len(losses) <= window_size:
        return state, None
    edge_numel = window_size // 4 if form == "edge" else 1
    return state, _performance(losses[-(window_size + 1) :], edge_numel)


def recent(state: PerformanceState, numel: int, *, form: Form) -> float | None:
    """P of the newest losses alone, as if M were `numel` - 1.

    Args:
        state: the window.
        numel: how many losses, >= 5.
        form: which formula.

    Returns:
        P as `observe` gives it; None while fewer losses are known.

    Raises:
        ValueError: `numel` is below 5.
    """
    if numel < 5:
        raise ValueError(f"numel must be at least 5, got {numel!r}.")
    if len(state.losses) < numel:
        return None
    edge_numel = (numel - 1) // 4 if form == "edge" else 1
    return _performance(state.losses[-numel:], edge_numel)


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
    edge_numel = window_size // 4 if form == "edge" else 1
    root = math.sqrt(2.0 * math.log(window_size))
    largest = root - (math.log(math.log(window_size)) + math.log(4.0 * math.pi)) / (2.0 * root)
    return math.sqrt(2.0 / edge_numel) / (largest + _EULER / root)


def _performance(losses: tuple[float, ...], edge_numel: int) -> float:
    """P of exactly M+1 losses. fsum: the same bits on every Python version, so on every rank."""
    window = losses[1:]
    mean = math.fsum(window) / len(window)
    spread = mean - min(window)
    if spread < _FLAT * max(1.0, abs(mean)):
        return 0.0
    fall = (math.fsum(losses[:edge_numel]) - math.fsum(losses[-edge_numel:])) / edge_numel
    return max(-PERFORMANCE_LIMIT, min(PERFORMANCE_LIMIT, fall / spread))


def _usable(loss: float) -> bool:
    return abs(loss) <= _LOSS_LIMIT  # False for nan, too
