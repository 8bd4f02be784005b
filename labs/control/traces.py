"""What a link does over a run: its rate at every step, and how unsteady it is.

The numbers of a trace depend on its name, the seed and the number of steps alone. Rates are those
of the slowest host's link, bits per second.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MBIT = 1e6
LEAST, MOST = 50 * MBIT, 4000 * MBIT

BEGIN_STEPS = 100
"""Before it nothing changes and nothing is scored: warm-up, ramp and the first plan."""

SETTLE_LEAST, SETTLE_MOST = 1.99, 20.01
"""Changes of the rate whose settling is scored."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One link.

    Attributes:
        name: of the kind.
        rates: bits per second, one per step.
        noise: standard deviation of the logarithm of a wire time.
        outliers: share of steps whose wire time is multiplied.
        outlier_most: by at most so much; at least by 2, or by half of it.
        stragglers: share of steps in which one host computes 1.3 to 2.5 times as long.
        stalls: seconds added to the exchange of single steps, by step.
        settles: whether its changes are scored for settling.
    """

    name: str
    rates: tuple[float, ...]
    noise: float = 0.05
    outliers: float = 0.02
    outlier_most: float = 4.0
    stragglers: float = 0.0
    stalls: tuple[tuple[int, float], ...] = ()
    settles: bool = False

    def changes(self) -> list[tuple[int, float]]:
        """(first step at a new rate counted from 0, new rate / old rate), settling ones only."""
        if not self.settles:
            return []
        found = []
        for step in range(1, len(self.rates)):
            factor = self.rates[step] / self.rates[step - 1]
            if SETTLE_LEAST <= max(factor, 1.0 / factor) <= SETTLE_MOST:
                found.append((step, factor))
        return found


def _steps(rng: random.Random, steps: int) -> Trace:
    """Jumps by 2 to 20 times, either way, every 100 to 250 steps."""
    rates: list[float] = []
    rate = math.exp(rng.uniform(math.log(4 * LEAST), math.log(MOST / 4)))
    length = BEGIN_STEPS + rng.randint(50, 150)
    while len(rates) < steps:
        rates += [rate] * length
        factor = math.exp(rng.uniform(math.log(2.0), math.log(20.0)))
        up, down = rate * factor <= MOST, rate / factor >= LEAST
        while not (up or down):
            factor /= 1.2
            up, down = rate * factor <= MOST, rate / factor >= LEAST
        rate = rate * factor if up and (not down or rng.random() < 0.5) else rate / factor
        length = rng.randint(100, 250)
    return Trace("steps", tuple(rates[:steps]), settles=True)


def _square(rng: random.Random, steps: int) -> Trace:
    high, half = rng.uniform(400, 2000) * MBIT, rng.randint(60, 120)
    low = high / rng.uniform(2.0, 8.0)
    later = [high if (i // half) % 2 else low for i in range(steps)]
    return Trace("square", tuple(([high] * BEGIN_STEPS + later)[:steps]), settles=True)


def _walk(rng: random.Random, steps: int) -> Trace:
    """The logarithm walks: every 25 steps by a normal number of standard deviation 0.35."""
    low, width = math.log(LEAST), math.log(MOST / LEAST)
    place = rng.uniform(0.3, 0.7) * width
    rates: list[float] = []
    while len(rates) < steps:
        rates += [math.exp(low + place)] * (25 if rates else BEGIN_STEPS)
        turn = (place + rng.gauss(0.0, 0.35)) % (2 * width)
        place = min(turn, 2 * width - turn)
    return Trace("walk", tuple(rates[:steps]))


def _drift(rng: random.Random, steps: int) -> Trace:
    """A slow wave by 2.5 times either way, as of a link whose other users come and go."""
    middle, period = rng.uniform(200, 800) * MBIT, rng.uniform(1000, 2000)
    rates = [
        middle * 2.5 ** math.sin(2 * math.pi * max(0, i - BEGIN_STEPS) / period)
        for i in range(steps)
    ]
    return Trace("drift", tuple(rates))


def _outages(rng: random.Random, steps: int) -> Trace:
    """Single steps that hang for 2 to 30 s, every 60 to 200 steps, twice running now and then."""
    stalls, at = [], BEGIN_STEPS + rng.randint(20, 60)
    while at < steps:
        stalls.append((at, rng.uniform(2.0, 30.0)))
        if rng.random() < 0.3 and at + 1 < steps:
            stalls.append((at + 1, rng.uniform(2.0, 30.0)))
        at += rng.randint(60, 200)
    return Trace("outages", (rng.uniform(200, 1000) * MBIT,) * steps, stalls=tuple(stalls))


def _stragglers(rng: random.Random, steps: int) -> Trace:
    rate = rng.uniform(200, 1000) * MBIT
    return Trace("stragglers", (rate,) * steps, stragglers=0.2)


def _outliers(rng: random.Random, steps: int) -> Trace:
    rate = rng.uniform(200, 1000) * MBIT
    return Trace("outliers", (rate,) * steps, outliers=0.05, outlier_most=8.0)


def _stationary(rng: random.Random, steps: int) -> Trace:
    return Trace("stationary", (rng.uniform(100, 1000) * MBIT,) * steps, noise=0.10)


def _fast(rng: random.Random, steps: int) -> Trace:
    """So fast in its middle that the dense exchange fits the budget."""
    slow, fast = rng.uniform(400, 1000) * MBIT, rng.uniform(60_000, 100_000) * MBIT
    third = steps // 3
    rates = [slow] * third + [fast] * third + [slow] * (steps - 2 * third)
    return Trace("fast", tuple(rates))


KINDS: dict[str, Callable[[random.Random, int], Trace]] = {
    "steps": _steps,
    "square": _square,
    "walk": _walk,
    "drift": _drift,
    "outages": _outages,
    "stragglers": _stragglers,
    "outliers": _outliers,
    "stationary": _stationary,
    "fast": _fast,
}


def make_trace(kind: str, seed: int, steps: int) -> Trace:
    """One link of a kind."""
    return KINDS[kind](random.Random(f"{kind} {seed}"), steps)


def add_recorded(name: str, rates: Sequence[float]) -> None:
    """Make a recorded link one of the kinds.

    Args:
        name: of the kind.
        rates: at every step as measured, noise included, bits per second; repeated as needed.
    """

    def make(_: random.Random, steps: int) -> Trace:
        repeated = [rates[0]] * BEGIN_STEPS + list(rates) * (steps // len(rates) + 1)
        return Trace(name, tuple(repeated[:steps]), noise=0.0, outliers=0.0)

    KINDS[name] = make
