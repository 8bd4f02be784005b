"""Which runs are made, in which order.

One round after the other; in a round every method in turn, beginning with another one each time, so
that what else the machine does falls on all of them alike. All methods of a round have the same
seed. For a method whose loss does not depend on the link, a round is one unshaped run, which gives
the loss, and a short stretch at each rate, which gives the times. Ours and rounds run in full at
each rate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labs.race.crew import Crew, Place, Stretch, crew
from labs.race.job import Recipe
from labs.race.methods import DENSE, Method
from tools.netbed import parse_rate

SETTLE_STEPS = 2
"""After a change of the rate, uncounted: queues and windows find their size."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for.

    Attributes:
        methods: which.
        rates: of the links, "20mbit"; None: unshaped. Unshaped is always among them.
        rounds: repetitions, each with its own seed.
        steps: the validation loss is reported after so many.
        extend: methods other than dense_fp32 train for this many times the steps, so that one
            that learns slower per step, or a hair worse, may still reach dense's loss.
        eval_every: steps between validations.
        timing_steps: of a short stretch.
        recipe: how to train.
    """

    methods: Sequence[Method]
    rates: Sequence[str | None]
    rounds: int
    steps: int
    extend: float
    eval_every: int
    timing_steps: int
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of a method at a rate.

    Attributes:
        method: name.
        rate: as asked for; None: unshaped.
        round: counted from 0; also the seed.
        num_parameters: of the model.
        opening: the steps before compression began, and 0/1 Adam's before its second moment is
            frozen; empty where there are none, and in a short stretch, which begins after them.
        rest: all others.
    """

    method: str
    rate: str | None
    round: int
    num_parameters: int
    opening: Stretch
    rest: Stretch

    @property
    def is_short(self) -> bool:
        """It gives times, not losses."""
        return not self.rest.validations

    def to_json(self) -> dict[str, Any]:
        """For a file: the steps as columns, times to 10 microseconds."""
        steps = [*self.opening.steps, *self.rest.steps]
        columns = {
            name: [_short_number(getattr(step, name)) for step in steps]
            for name in ("loss", "wall_s", "compute_s", "codec_s", "comm_s", "density")
        }
        return {
            "method": self.method,
            "rate_mbit": rate_mbit(self.rate),
            "round": self.round,
            "opening_steps": len(self.opening.steps),
            "wire_bytes": self.rest.wire_bytes,
            "validations": [*self.opening.validations, *self.rest.validations],
            "first_step": steps[0].step,
            "kind": [step.kind for step in steps],
            **columns,
        }


def _short_number(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def rate_mbit(rate: str | None) -> float | None:
    """Megabit per second; None: unshaped."""
    bps = parse_rate(rate)
    return None if bps is None else bps / 1e6


def execute(
    plan: Plan,
    place: Place,
    data: Path,
    say: Callable[[str], None],
    done: Sequence[Sequence[Run]] = (),
) -> Iterator[list[Run]]:
    """Make all runs.

    Args:
        plan: what is asked for.
        place: where the ranks run.
        data: folder of the tokens.
        say: shows one line.
        done: what was yielded before an interruption; it is not made again.

    Yields:
        All runs of one start of the ranks, as soon as they are over.

    Raises:
        GradPruneError: a rank ended early.
    """
    known = {(runs[0].method, runs[0].rate, runs[0].round) for runs in done}
    for number in range(plan.rounds):
        turn = number % len(plan.methods)
        for method in [*plan.methods[turn:], *plan.methods[:turn]]:
            for rate in plan.rates if method.runs_at_rates else [None]:
                if (method.name, rate, number) in known:
                    continue
                shown = "" if rate is None else f" at {rate}"
                say(f"round {number + 1} of {plan.rounds}: {method.name}{shown}")
                with crew(place, method.name, plan.recipe, data, number, rate) as ranks:
                    runs = [_whole(plan, method, rate, number, ranks)]
                    if not method.runs_at_rates:
                        runs += _short(plan, method, number, ranks, say)
                yield runs


def _whole(plan: Plan, method: Method, rate: str | None, number: int, ranks: Crew) -> Run:
    """A run that gives the loss."""
    steps = plan.steps if method.name == DENSE else round(plan.steps * plan.extend)
    first = plan.recipe.opening_steps(method)
    opening = ranks.train(first, plan.eval_every) if first else Stretch([], [], None)
    rest = ranks.train(steps - first, plan.eval_every)
    return Run(method.name, rate, number, ranks.num_parameters, opening, rest)


def _short(
    plan: Plan, method: Method, number: int, ranks: Crew, say: Callable[[str], None]
) -> Iterator[Run]:
    """Stretches that give the times, on a model that is trained already."""
    for rate in plan.rates:
        if rate is None:
            continue
        say(f"round {number + 1} of {plan.rounds}: {method.name}, times at {rate}")
        with _shaped(ranks, rate):
            ranks.train(SETTLE_STEPS)
            rest = ranks.train(plan.recipe.timing_steps(method, plan.timing_steps))
        opening = Stretch([], [], None)
        yield Run(method.name, rate, number, ranks.num_parameters, opening, rest)


@contextlib.contextmanager
def _shaped(ranks: Crew, rate: str) -> Iterator[None]:
    ranks.set_rate(rate)
    yield
    ranks.set_rate(None)
