"""Where a run's steps are written down: a JSON-lines log, DeepSpeed's monitor, a logger."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from typing import Any

from ds_gradprune.records import StepReport

decisions_logger = logging.getLogger("ds_gradprune.decisions")
"""One INFO line for every change of density, with its reason."""


class StepLog:
    """One JSON line per step. Written by rank 0 only.

    Args:
        path: the file; appended to, its folder is made. None: nothing is written.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._file = None
        if path is not None:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")

    def write(self, report: StepReport) -> None:
        """Append one step; it is on its way to the disk when the call returns."""
        if self._file is not None:
            self._file.write(json.dumps(as_json(report)) + "\n")
            self._file.flush()

    def rewind(self, step: int) -> None:
        """Drop every line after `step`: a resumed run writes them again."""
        if self._file is None or self._path is None:
            return
        self._file.close()
        with open(self._path, encoding="utf-8") as old:
            kept = [line for line in old if _step_of(line) <= step]
        temporary = self._path + ".tmp"
        with open(temporary, "w", encoding="utf-8") as new:
            new.writelines(kept)
        os.replace(temporary, self._path)
        self._file = open(self._path, "a", encoding="utf-8")

    def close(self) -> None:
        """Close the file; twice is fine."""
        if self._file is not None:
            self._file.close()
            self._file = None


def as_json(report: StepReport) -> dict[str, Any]:
    """A report as plain JSON types; the names are those of the records."""
    return dataclasses.asdict(
        report, dict_factory=lambda items: {k: getattr(v, "value", v) for k, v in items}
    )


def write_events(engine: Any, report: StepReport) -> None:
    """Send the step's numbers to DeepSpeed's monitor; its x axis is samples. Rank 0 writes."""
    if not engine.monitor.enabled:
        return
    values = {
        "density": report.density,
        "performance": report.performance,
        "wire_bytes": report.wire_bytes,
        "step_time_s": report.step_time_s,
        "comm_time_s": report.comm_time_s,
        "codec_time_s": report.codec_time_s,
    }
    engine.monitor.write_events(
        [
            (f"Train/Samples/gradient_pruning_{name}", value, engine.global_samples)
            for name, value in values.items()
            if value is not None
        ]
    )


def log_decision(report: StepReport) -> None:
    """Tell of a change of density, once, with its reason."""
    if report.decision.density != report.density:
        decisions_logger.info(
            "step %d: %s (%s)",
            report.decision.step,
            report.decision.reason,
            report.decision.cause.value,
        )


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line cut by a crash belongs to no finished step
