"""What a training loss does over a run. A mini-batch's noise is independent from step to step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

SIGMA = 0.05
"""Standard deviation of one step's loss."""

WINDOW = 128
"""M of the laws that look at the loss."""

RISE_PER_WINDOW = 8.0
"""The rising loss rises by so many standard deviations in M steps."""


def _healthy(step: int, steps: int) -> float:
    """A late run: step 5,000 and on of a power law."""
    return 2.0 + 30.0 * (5000.0 + step) ** -0.35


def _plateau(step: int, steps: int) -> float:
    return 2.0


def _rise(step: int, steps: int) -> float:
    """A plateau up to half, then a steady rise."""
    return 2.0 + RISE_PER_WINDOW * SIGMA / WINDOW * max(0, step - rise_begins(steps))


def rise_begins(steps: int) -> int:
    """First step of the rise, counted from 0."""
    return steps // 2


def _spike(step: int, steps: int) -> float:
    """Healthy, but every 300 steps the loss leaps and decays within ten."""
    since = step % 300 if step >= 300 else 300
    return _healthy(step, steps) + 40.0 * SIGMA * math.exp(-since / 3.0)


def _restarts(step: int, steps: int) -> float:
    """Warm restarts of the learning rate: every 400 steps the loss leaps and takes 100 back."""
    since = step % 400 if step >= 400 else 400
    return _healthy(step, steps) + 10.0 * SIGMA * math.exp(-since / 50.0)


def _nan(step: int, steps: int) -> float:
    """Healthy, but not a number in some steps, and in ten running."""
    if step % 97 == 50 or steps // 2 <= step < steps // 2 + 10:
        return math.nan
    return _healthy(step, steps)


def _cut(loss: Callable[[int, int], float]) -> Callable[[int, int], float]:
    """Every 50th step is told as half of its loss, as where an epoch's end cut its micro-steps."""
    return lambda step, steps: loss(step, steps) * (0.5 if step % 50 == 49 else 1.0)


KINDS: dict[str, Callable[[int, int], float]] = {
    "healthy": _healthy,
    "plateau": _plateau,
    "rise": _rise,
    "spike": _spike,
    "restarts": _restarts,
    "nan": _nan,
    "cut": _cut(_healthy),
    "cut_rise": _cut(_rise),
}


RISING = ("rise", "cut_rise")
"""Kinds that rise from the middle on, and want an answer."""


def make_losses(kind: str, seed: int, steps: int) -> list[float]:
    """One run's training losses, mean over ranks."""
    rng = random.Random(f"{kind} {seed}")
    return [KINDS[kind](step, steps) + rng.gauss(0.0, SIGMA) for step in range(steps)]
