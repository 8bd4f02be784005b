"""The plan of a campaign: which grids are run where, and which of their runs are worth most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import pydantic

from ds_gradprune.errors import ConfigError
from labs.convergence.grid import Count, Positive, Strict


class Case(Strict):
    """A grid to be run.

    Attributes:
        grid: its file, relative to the plan's.
        workers: simulated hosts.
        steps: optimizer steps of a run.
        seeds: seeds 0 .. S - 1.
        lrs: learning rates of the dense runs; the best is the methods'.
    """

    grid: str
    workers: Count
    steps: Count
    seeds: Count
    lrs: tuple[Positive, ...]


class Job(Strict):
    """Runs that one process makes, side by side where their kinds allow it.

    Attributes:
        case: name of the case.
        methods: names in its grid; none: its dense runs, at every learning rate.
        seeds: of every method; None: all of the case.
        lr_factor: times the best learning rate.
    """

    case: str
    methods: tuple[str, ...]
    seeds: tuple[Annotated[int, pydantic.Field(ge=0)], ...] | None = None
    lr_factor: Positive = 1.0


class Plan(Strict):
    """A whole plan.

    Attributes:
        cases: by name.
        jobs: most valuable first. One waits until the dense runs of its case are there, and the
            next that need not wait goes before.
        dense_at_once: so many jobs of dense runs at a time, that the first soon end.
    """

    cases: dict[str, Case]
    jobs: tuple[Job, ...]
    dense_at_once: Count = 1

    @pydantic.model_validator(mode="after")
    def _check(self) -> Plan:
        unknown = sorted({job.case for job in self.jobs} - set(self.cases))
        if unknown:
            raise ValueError(f"jobs[].case must be the name of a case, got {unknown}.")
        return self


def read_plan(path: Path) -> Plan:
    """Read and check a plan.

    Raises:
        ConfigError: it cannot be read or is not as `Plan` says.
    """
    try:
        return Plan.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path} must be a plan: {exc}.") from exc
