"""Training through a link whose rate changes: when which rate holds, and what came of it.

`drive` needs something that trains and something that shapes; everything else is arithmetic.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from labs.race.crew import Step, Stretch

By = Literal["steps", "time"]

TIME_CHUNK_STEPS = 5
"""With --by time the rate may change after so many steps."""


class Ranks(Protocol):
    """What trains; `labs.race.crew.Crew` is one."""

    def set_rate(self, rate: str | None) -> None:
        """Shape all links from now on."""
        ...

    def train(self, steps: int, eval_every: int | None = None) -> Stretch:
        """Train on."""
        ...


@dataclass(frozen=True, slots=True)
class Route:
    """Which rate holds when.

    Attributes:
        rates: in order, "200mbit"; None: unshaped.
        steps: of the whole run.
        by: what a rate lasts: an equal share of the steps, or a time.
        each_s: by time: how long each rate lasts, seconds of training; then the first again.
    """

    rates: tuple[str | None, ...]
    steps: int
    by: By = "steps"
    each_s: float = 60.0

    def rate_at(self, done_steps: int, trained_s: float) -> str | None:
        """The rate of the next step, after so many steps and seconds of training."""
        if self.by == "time":
            return self.rates[int(trained_s / self.each_s) % len(self.rates)]
        return self.rates[min(len(self.rates) - 1, done_steps * len(self.rates) // self.steps)]

    def chunk(self, done_steps: int) -> int:
        """How many steps may be trained before the rate is looked at again."""
        left = self.steps - done_steps
        if self.by == "time":
            return min(TIME_CHUNK_STEPS, left)
        share = done_steps * len(self.rates) // self.steps
        ends = -(-(share + 1) * self.steps // len(self.rates))
        return min(left, ends - done_steps)


@dataclass(frozen=True, slots=True)
class Trip:
    """One method's whole run.

    Attributes:
        method: name.
        seed: of weights and data.
        rates: one per step, as asked for.
        steps: in order.
        validations: (step, validation loss).
    """

    method: str
    seed: int
    rates: list[str | None]
    steps: list[Step]
    validations: list[tuple[int, float]]

    def to_json(self) -> dict[str, Any]:
        """For a file; `python -m labs.control --replay` reads it."""
        steps = [
            asdict(step) | {"rate": rate} for step, rate in zip(self.steps, self.rates, strict=True)
        ]
        return {
            "method": self.method,
            "seed": self.seed,
            "steps": steps,
            "validations": self.validations,
        }


def drive(method: str, seed: int, route: Route, ranks: Ranks, eval_every: int) -> Trip:
    """Train through the whole route.

    Args:
        method: name, for the record.
        seed: likewise.
        route: which rate holds when.
        ranks: what trains.
        eval_every: steps between validations, which count no time.
    """
    trip = Trip(method, seed, [], [], [])
    trained_s, shaped = 0.0, object()
    while len(trip.steps) < route.steps:
        rate, count = route.rate_at(len(trip.steps), trained_s), route.chunk(len(trip.steps))
        if rate != shaped:
            ranks.set_rate(rate)
            shaped = rate
        stretch = ranks.train(count, eval_every)
        trip.steps.extend(stretch.steps)
        trip.rates.extend([rate] * len(stretch.steps))
        trip.validations.extend(stretch.validations)
        trained_s += sum(step.wall_s for step in stretch.steps)
    return trip


def wall_to_loss(trip: Trip, loss: float) -> float | None:
    """Seconds of training up to the first validation at or below `loss`; None: never."""
    for step, value in trip.validations:
        if value <= loss:
            return sum(one.wall_s for one in trip.steps if one.step <= step)
    return None


def common_loss(trips: Sequence[Trip], ours: str) -> float:
    """The loss that all are timed to: the worse of ours' and the best static one's final loss.

    Raises:
        ValueError: one of the two is missing.
    """
    own = [trip.validations[-1][1] for trip in trips if trip.method == ours]
    static = [trip.validations[-1][1] for trip in trips if trip.method != ours]
    return max(min(own), min(static))


def figures(trip: Trip, loss: float, budget_s: float | None) -> dict[str, Any]:
    """What came of one run.

    Args:
        trip: the run.
        loss: that it is timed to.
        budget_s: the user's; None: the law's own, which moves, so no share of steps within it.
    """
    pruned = [step for step in trip.steps if step.kind == "usual"]
    met = [] if budget_s is None else [_own_s(step) <= budget_s for step in pruned]
    densities = [step.density for step in pruned if step.density is not None]
    return {
        "wall_s": sum(step.wall_s for step in trip.steps),
        "wall_s_to_loss": wall_to_loss(trip, loss),
        "val_loss": trip.validations[-1][1],
        "in_budget": statistics.fmean(met) if met else None,
        "density_min": min(densities, default=None),
        "density_max": max(densities, default=None),
        "changes": sum(a != b for a, b in itertools.pairwise(densities)),
    }


def _own_s(step: Step) -> float:
    """A step without what its ranks waited for each other."""
    return step.compute_s + step.codec_s + step.comm_s


def summarize(trips: Sequence[Trip], ours: str, budget_s: float | None) -> dict[str, Any]:
    """All methods, each the median over its seeds, and how much faster ours is.

    Args:
        trips: all runs.
        ours: name of our method.
        budget_s: see `figures`.
    """
    losses = {
        seed: common_loss([trip for trip in trips if trip.seed == seed], ours)
        for seed in {trip.seed for trip in trips}
    }
    rows: dict[str, list[dict[str, Any]]] = {}
    for trip in trips:
        rows.setdefault(trip.method, []).append(figures(trip, losses[trip.seed], budget_s))
    methods = {name: {key: _median(row, key) for key in row[0]} for name, row in rows.items()}
    times = [methods[name]["wall_s_to_loss"] for name in methods if name != ours]
    reached = [time_s for time_s in times if time_s is not None]
    own_s = methods[ours]["wall_s_to_loss"]
    speedup = min(reached) / own_s if reached and own_s else None
    return {"methods": methods, "speedup": speedup}


def _median(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """None where it is None in some run: a loss that is reached by chance is not reached."""
    values = [row[key] for row in rows]
    return None if any(value is None for value in values) else statistics.median(values)
