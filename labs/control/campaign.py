"""All laws on all links and losses, and the figures from that."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from labs.control import losses as loss_traces
from labs.control import traces
from labs.control.laws import make_law
from labs.control.plant import draw
from labs.control.score import (
    Course,
    changes,
    in_budget,
    log_densities,
    run_law,
    settles,
)
from labs.control.tally import Sums
from labs.control.traces import Trace

HOSTS = (4, 8)
LOSS_LINK = "calm"
"""Loss traces run on an unchanged link, so that what moves the density is the loss."""


@dataclass(slots=True)
class Tally(Sums):
    """What is summed over the runs of one law on links of one kind."""

    log_oracle: float = 0.0
    log_fill: float = 0.0

    def add(self, course: Course, oracle: Course, trace: Trace) -> None:
        """One run."""
        for factor, settled, late in settles(course, oracle, trace):
            (self.up if factor > 1.0 else self.down).append(settled)
            if factor < 1.0:
                self.late.append(late)
        met, meetable = in_budget(course, oracle)
        self.met, self.meetable = self.met + met, self.meetable + meetable
        by_oracle, by_fill, steps = log_densities(course, oracle, trace)
        self.log_oracle += by_oracle
        self.log_fill += by_fill
        self.steps += steps
        if trace.name == "stationary":
            self.stationary.append(changes(course))
        if course.update_s is not None:
            self.update_us.append(1e6 * course.update_s / len(course.step_s))

    def shares(self) -> dict[str, float | None]:
        """See `Sums`."""
        steps = self.steps
        return {
            "density_vs_oracle": math.exp(self.log_oracle / steps) if steps else None,
            "density_vs_fill": math.exp(self.log_fill / steps) if steps else None,
        }


@dataclass(slots=True)
class LossTally:
    """What is summed over the runs of one law on losses of one kind."""

    misses: int = 0
    evaluations: int | None = 0
    answers: list[int] = field(default_factory=list)
    unanswered: int = 0
    end_density: list[float] = field(default_factory=list)
    over_share: list[float] = field(default_factory=list)

    def add(self, course: Course, oracle: Course) -> None:
        """One run."""
        self.misses += len(course.misses)
        if course.evaluations is None or self.evaluations is None:
            self.evaluations = None
        else:
            self.evaluations += course.evaluations
        if course.losses in loss_traces.RISING:
            begin = loss_traces.rise_begins(len(course.step_s))
            answer = next((step - begin for step in course.misses if step >= begin), None)
            if answer is None:
                self.unanswered += 1
            else:
                self.answers.append(answer)
        quarter = len(course.densities) // 4
        ratios = [o / b for o, b in zip(course.densities, oracle.densities, strict=True)]
        self.end_density.append(statistics.fmean(ratios[-quarter:]))
        later = ratios[traces.BEGIN_STEPS :]
        self.over_share.append(sum(ratio > 1.25 for ratio in later) / max(1, len(later)))

    def figures(self) -> dict[str, Any]:
        """Misses of P(t) called, and what became of the density."""
        share = self.misses / self.evaluations if self.evaluations else None
        return {
            "miss_share": share,
            "answered_within_max": max(self.answers) if self.answers else None,
            "unanswered": self.unanswered,
            "end_density_vs_oracle_max": max(self.end_density),
            "over_budget_density_share": statistics.fmean(self.over_share),
        }


def run_all(
    names: Sequence[str], seeds: int, steps: int, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Every law on every trace.

    Args:
        names: laws.
        seeds: runs of each trace and number of hosts.
        steps: of each run.
        say: shows one line.

    Returns:
        For each law its figures; under `links` and `losses` those of each kind of trace.
    """
    links: dict[str, dict[str, Tally]] = {name: {} for name in names}
    for kind in traces.KINDS:
        say(f"link {kind}: {seeds} seeds, hosts {HOSTS}")
        for hosts, seed in _places(seeds):
            trace = traces.make_trace(kind, seed, steps)
            losses = loss_traces.make_losses("healthy", seed, steps)
            oracle, *courses = _courses(names, trace, ("healthy", losses), hosts, seed)
            for course in courses:
                links[course.law].setdefault(kind, Tally()).add(course, oracle, trace)
    by_loss: dict[str, dict[str, LossTally]] = {name: {} for name in names}
    for kind in loss_traces.KINDS:
        say(f"loss {kind}: {seeds} seeds")
        for hosts, seed in _places(seeds):
            trace = Trace(LOSS_LINK, (500 * traces.MBIT,) * steps)
            losses = loss_traces.make_losses(kind, hosts * 1000 + seed, steps)
            oracle, *courses = _courses(names, trace, (kind, losses), hosts, seed)
            for course in courses:
                by_loss[course.law].setdefault(kind, LossTally()).add(course, oracle)
    return {name: _figures(links[name], by_loss[name]) for name in names}


def _figures(links: dict[str, Tally], losses: dict[str, LossTally]) -> dict[str, Any]:
    kinds = {kind: tally.figures() for kind, tally in links.items()}
    whole = Tally().merge(list(links.values())).figures()
    by_loss = {kind: tally.figures() for kind, tally in losses.items()}
    false_miss = by_loss["healthy"]["miss_share"]
    return {**whole, "false_miss": false_miss, "links": kinds, "losses": by_loss}


def _places(seeds: int) -> Iterator[tuple[int, int]]:
    return ((hosts, seed) for hosts in HOSTS for seed in range(seeds))


def _courses(
    names: Sequence[str], trace: Trace, losses: tuple[str, list[float]], hosts: int, seed: int
) -> list[Course]:
    """The oracle's first, then those of all laws."""
    chance = draw(trace, hosts, seed)
    return [
        run_law(name, partial(make_law, name, trace, hosts), trace, losses, (hosts, seed), chance)
        for name in ("oracle", *names)
    ]


def follow(names: Sequence[str], kind: str, hosts: int, seed: int, steps: int) -> list[Course]:
    """One run of each law on one link, for a plot; the oracle's first."""
    trace = traces.make_trace(kind, seed, steps)
    losses = loss_traces.make_losses("healthy", seed, steps)
    return _courses(names, trace, ("healthy", losses), hosts, seed)
