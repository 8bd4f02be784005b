"""How well a law did.

- **settle**: from the first step at a new rate (0) to the first step from which the median of five
  step times is at most 1.02 of the budget and whose density is at least 0.6 of the oracle's. A law
  that has not settled when the rate changes again counts with the whole stretch. The median
  forgives two steps in five; so `late` counts strictly.
- **late**: steps over budget among the first 20 after a fall of the rate, of those the oracle met.
- **in budget**: share of the steps that the oracle met (it knows the rate, not the step's chance)
  which the law met as well.
- **density**: geometric mean of the law's density over the oracle's, which leaves two standard
  deviations of the noise; `fill` over the one that would use the budget up exactly were there none.
- **changes**: moves of the density in the last 1,000 steps of a stationary run.
- **false miss**: share of the evaluations of P(t) that called it missed on a healthy late run.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ds_gradprune.law.signals import StepSignals
from labs.control.laws import Law, best_density
from labs.control.plant import BUDGET_S, Chance, Plant
from labs.control.traces import BEGIN_STEPS, Trace

STATIONARY_STEPS = 1000
TIMED_SEEDS = 3
"""Runs of each trace on which a law's own time is measured."""

_LATE_WITHIN = 20
_MEDIAN_OF = 5


@dataclass(frozen=True, slots=True)
class Course:
    """One law on one run.

    Attributes:
        law, trace, losses: names.
        hosts, seed: of the run.
        densities: as used, one per step.
        step_s: what the steps took.
        misses: steps (from 0) whose signals made the law call P missed.
        evaluations: how often it looked at P; None: it never does.
        update_s: processor time of all updates; None: not measured.
    """

    law: str
    trace: str
    losses: str
    hosts: int
    seed: int
    densities: list[float]
    step_s: list[float]
    misses: list[int]
    evaluations: int | None
    update_s: float | None


def run_law(
    name: str,
    make: Callable[[], Law],
    trace: Trace,
    losses: tuple[str, list[float]],
    place: tuple[int, int],
    chance: Chance,
) -> Course:
    """Let a law steer a run, and then time it alone on the signals that it saw.

    Args:
        name: of the law.
        make: the law at its start.
        trace: the link.
        losses: their name, and one per step.
        place: hosts and seed.
        chance: what happens whoever steers.
    """
    hosts, seed = place
    plant, law = Plant(trace, losses[1], hosts, chance), make()
    densities, step_s, misses, evaluations, seen = [], [], [], 0, []
    for step in range(len(trace.rates)):
        density = law.density
        signals, took_s = plant.run_step(step, density)
        densities.append(density)
        step_s.append(took_s)
        seen.append(signals)
        law.update(signals)
        evaluations += law.evaluated
        if law.missed:
            misses.append(step)
    update_s = _time_alone(make(), seen) if seed < TIMED_SEEDS else None
    looks = None if law.missed is None else evaluations
    return Course(
        name, trace.name, losses[0], hosts, seed, densities, step_s, misses, looks, update_s
    )


def _time_alone(law: Law, seen: Sequence[StepSignals]) -> float:
    """Processor time of all updates together, seconds."""
    begin_s = time.thread_time()
    for signals in seen:
        law.update(signals)
    return time.thread_time() - begin_s


def settles(course: Course, oracle: Course, trace: Trace) -> list[tuple[float, int, int]]:
    """For each scored change: new rate / old rate, steps to settle, steps late."""
    moves = trace.changes()
    ends = [*(step for step, _ in moves), len(trace.rates)][1:]
    found = []
    for (begin, factor), end in zip(moves, ends, strict=True):
        if end - begin < 2 * _LATE_WITHIN:
            continue  # cut off by the end of the run
        settled = next(
            (
                step - begin
                for step in range(begin, end - _MEDIAN_OF + 1)
                if statistics.median(course.step_s[step : step + _MEDIAN_OF]) <= 1.02 * BUDGET_S
                and course.densities[step] >= 0.6 * oracle.densities[step]
            ),
            end - begin,
        )
        late = sum(
            course.step_s[step] > BUDGET_S >= oracle.step_s[step]
            for step in range(begin, begin + _LATE_WITHIN)
        )
        found.append((factor, settled, late))
    return found


def in_budget(course: Course, oracle: Course) -> tuple[int, int]:
    """Steps met by both, and by the oracle."""
    pairs = list(zip(course.step_s, oracle.step_s, strict=True))[BEGIN_STEPS:]
    met = [ours <= BUDGET_S for ours, best in pairs if best <= BUDGET_S]
    return sum(met), len(met)


def log_densities(course: Course, oracle: Course, trace: Trace) -> tuple[float, float, int]:
    """Sums of log(density / oracle's) and of log(density / exact fill), and the number of steps."""
    fill = {rate: best_density(rate, course.hosts, 0.0) for rate in set(trace.rates)}
    rows = list(zip(course.densities, oracle.densities, trace.rates, strict=True))[BEGIN_STEPS:]
    return (
        math.fsum(math.log(own / best) for own, best, _ in rows),
        math.fsum(math.log(own / fill[rate]) for own, _, rate in rows),
        len(rows),
    )


def changes(course: Course) -> int:
    """Moves of the density in the last STATIONARY_STEPS steps."""
    last = course.densities[max(2 * BEGIN_STEPS, len(course.densities) - STATIONARY_STEPS) :]
    return sum(a != b for a, b in itertools.pairwise(last))


def percentile_95(values: Sequence[float]) -> float | None:
    """The smallest value that 95 % do not exceed; None of none."""
    ordered = sorted(values)
    return ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else None
