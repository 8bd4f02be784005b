"""What an unfinished campaign has measured so far, on disk: an interruption costs one run.

JSON lines: the plan first, then one line per visit, that is, all runs of one start of the ranks.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ds_gradprune.errors import ConfigError
from labs.race.campaign import Plan, Run
from labs.race.crew import Step, Stretch


class Record:
    """The file beside `--out`. Without an `--out` nothing is written.

    Args:
        out: where the results will be; the record is called *.part.jsonl.
        plan: what is asked for.
        resume: go on where a record of the same plan ends.

    Raises:
        ConfigError: there is a record and `resume` was not asked for, or it is of another plan.

    Attributes:
        visits: what was measured before.
    """

    def __init__(self, out: Path | None, plan: Plan, resume: bool) -> None:
        self.visits: list[list[Run]] = []
        self._path = None if out is None else out.with_suffix(".part.jsonl")
        if self._path is None:
            return
        first = json.dumps(dataclasses.asdict(plan))
        if not self._path.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(first + "\n")
            return
        if not resume:
            raise ConfigError(
                f"{self._path} must not be there: it holds an unfinished campaign. Continue it "
                "with --resume, or delete it."
            )
        # A last line without its end was being written when the campaign was killed.
        text = self._path.read_text()
        whole = text[: text.rfind("\n") + 1]
        lines = whole.splitlines()
        if lines[:1] != [first]:
            raise ConfigError(f"--resume must be given the flags that {self._path} began with.")
        self._path.write_text(whole)
        self.visits = [[_run(run) for run in json.loads(line)] for line in lines[1:]]

    def add(self, visit: list[Run]) -> None:
        """Keep what was just measured."""
        self.visits.append(visit)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps([dataclasses.asdict(run) for run in visit]) + "\n")

    def finish(self) -> None:
        """The results are written: the record goes."""
        if self._path is not None:
            self._path.unlink()


def _run(data: dict[str, Any]) -> Run:
    return Run(**data | {name: _stretch(data[name]) for name in ("opening", "rest")})


def _stretch(data: dict[str, Any]) -> Stretch:
    validations = [(int(step), float(loss)) for step, loss in data["validations"]]
    return Stretch([Step(**step) for step in data["steps"]], validations, data["wire_bytes"])
