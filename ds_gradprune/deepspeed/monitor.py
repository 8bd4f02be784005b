"""Where a run's steps are written down: a JSON-lines log, DeepSpeed's monitor, a logger.

Nothing here ends a training: a log that cannot be written says so once and stops. All functions are
local, and rank 0 alone calls them.

Longer than 300 lines: a log that stays small, and all that a screen is told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from ds_gradprune.bucket.layout import CHUNK_NUMEL, kept_per_chunk
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.law.decision import Cause, Decision
from ds_gradprune.law.verdict import Verdict
from ds_gradprune.train.report import StepReport

logger = logging.getLogger(__name__)

decisions_logger = logging.getLogger("ds_gradprune.decisions")
"""An INFO line for every change of density or interval; a WARNING for a hopeless budget."""

PREFIX = "Train/Samples/gradient_pruning_"
"""Before every name in DeepSpeed's monitor."""

MAX_BYTES = 64 * 2**20
"""A log's file is closed and a new one begun when it would grow beyond."""
KEPT_FILES = 2
"""So many closed files are kept beside the one that grows."""

_MISSED = 1.05
"""A budget counts as missed when a step takes so many times as long: less is noise."""

# ---- the log -------------------------------------------------------------------------------------


class StepLog:
    """One JSON line per exchange. Older files are named path.1 (the last one closed) and path.2.

    Args:
        path: the file; appended to, its folder is made. None: nothing is written.
        max_bytes: the file's size; None: it grows for ever.
        keep: closed files that are kept.
    """

    def __init__(
        self, path: str | None, max_bytes: int | None = MAX_BYTES, keep: int = KEPT_FILES
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._file: BinaryIO | None = None
        if path is not None:
            self._try(self._open)

    def write(self, report: StepReport) -> None:
        """Append one step; it is on its way to the disk when the call returns."""
        if self._file is not None:
            line = json.dumps(as_json(report)).encode("ascii") + b"\n"
            self._try(lambda: self._append(line))

    def rewind(self, step: int) -> None:
        """Drop every line after `step`: a resumed run writes them again."""
        if self._file is not None:
            self._try(lambda: self._drop_after(step))

    def close(self) -> None:
        """Close the file; twice is fine."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, ValueError) as exc:  # ValueError: a name that no file can have
            self.close()
            logger.warning(
                "%s cannot be written (%s); the steps from here on are not logged. Training goes "
                "on.",
                self._path,
                exc,
            )

    def _open(self) -> None:
        assert self._path is not None
        os.makedirs(os.path.dirname(os.path.abspath(self._path)), exist_ok=True)
        self._file = open(self._path, "ab")

    def _append(self, line: bytes) -> None:
        assert self._file is not None
        if not os.path.exists(str(self._path)):
            logger.warning("%s was removed, or its disk was unmounted; it begins anew.", self._path)
            self._file.close()
            self._open()
        size = self._file.tell()
        if self._max_bytes is not None and size and size + len(line) > self._max_bytes:
            self._rotate()
        self._file.write(line)
        self._file.flush()

    def _rotate(self) -> None:
        assert self._path is not None
        assert self._file is not None
        self._file.close()
        names = _names(self._path, self._keep)
        for newer, older in zip(names[-2::-1], names[:0:-1], strict=True):
            if os.path.exists(newer):
                os.replace(newer, older)
        if not self._keep:
            os.unlink(self._path)
        self._open()

    def _drop_after(self, step: int) -> None:
        assert self._path is not None
        assert self._file is not None
        self._file.close()
        for name in _names(self._path, self._keep):
            if os.path.exists(name):
                _keep_lines(name, step)
        self._open()


def read_log(path: str, keep: int = KEPT_FILES) -> Iterator[dict[str, Any]]:
    """The steps that a `StepLog` has written, the oldest first; lines that are cut are left out.

    Raises:
        OSError: there is no such log, or it cannot be read.
    """
    for name in reversed(_names(path, keep)):
        if name == path or os.path.exists(name):
            with open(name, "rb") as file:
                yield from (step for line in file if (step := _step_of(line)) is not None)


def as_json(report: StepReport) -> dict[str, Any]:
    """A report as plain JSON types; the names are those of the records. No number is inf or nan."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(report))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _names(path: str, keep: int) -> list[str]:
    """The file that grows, then the closed ones, the newest first."""
    return [path, *(f"{path}.{number}" for number in range(1, keep + 1))]


def _step_of(line: bytes) -> dict[str, Any] | None:
    """A line of the log; None: a crash has cut it, or it is none of ours."""
    try:
        step = json.loads(line)
        return step if isinstance(step["step"], int) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _keep_lines(path: str, last: int) -> None:
    """Keep the lines of steps up to `last`, each whole and with its end."""
    temporary = path + ".tmp"
    try:
        with open(path, "rb") as old, open(temporary, "wb") as new:
            for line in old:
                step = _step_of(line)
                if step is not None and step["step"] <= last:
                    new.write(line.rstrip(b"\r\n") + b"\n")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


# ---- DeepSpeed's monitor and the logger ----------------------------------------------------------


def write_events(
    engine: Any,
    report: StepReport,
    *,
    target: float | None = None,
    residual_norm: float | None = None,
) -> None:
    """Send the step's numbers to DeepSpeed's monitor; its x axis is samples.

    Args:
        engine: the DeepSpeed engine.
        report: the exchange.
        target: what P(t) was compared with.
        residual_norm: of what rank 0 has not sent yet.
    """
    if not engine.monitor.enabled:
        return
    rate = report.decision.rate_bytes_per_s
    values = {
        "loss": report.loss,
        "performance": report.performance,
        "target": target,
        "density": report.density,
        "interval": report.steps,
        "senders": report.senders,
        "wire_mb": report.wire_bytes / 1e6,
        "compression_rate": report.dense_bytes / report.wire_bytes if report.wire_bytes else None,
        "step_time_s": report.step_time_s,
        "compute_time_s": report.compute_time_s,
        "codec_time_s": report.codec_time_s,
        "comm_time_s": report.comm_time_s,
        "hidden_time_s": report.hidden_time_s,
        "link_mbit": None if rate is None else rate * 8e-6,
        "residual_norm": residual_norm,
        "cause": list(Cause).index(report.decision.cause),
    }
    engine.monitor.write_events(
        [
            (PREFIX + name, value, engine.global_samples)
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        ]
    )


def say_verdict(verdict: Verdict) -> None:
    """Say whether pruning pays: a WARNING where it does not. Every run shows it."""
    if not verdict.pays:
        decisions_logger.warning(verdict.text)
    else:
        show(verdict.text)


def show(text: str) -> None:
    """Good news: on stderr where nobody asked for our decisions. Python shows no INFO there."""
    if decisions_logger.isEnabledFor(logging.INFO):
        decisions_logger.info(text)
    elif decisions_logger.isEnabledFor(logging.WARNING):
        print(f"gradient pruning: {text}", file=sys.stderr, flush=True)


class DecisionLog:
    """Tells of changes of density or interval, once of the ramp, and once of a hopeless budget.

    That the warm-up goes on unpruned is shown by every run.

    Args:
        config: the validated block.
    """

    def __init__(self, config: GradientPruningConfig) -> None:
        self._budget_s = config.step_time_budget_s
        self._least = kept_per_chunk(config.density.min) / CHUNK_NUMEL
        self._is_told = False
        self._interval = config.first_interval
        self._is_unpruned = config.warmup_form == "unpruned"
        self._advice = (
            " or lower" if config.sync_every == "auto" else ", raise sync_every, or lower"
        )

    def begin(self, decision: Decision) -> None:
        """The warm-up is unpruned from step 1 on, because of a trial of the link."""
        self._is_unpruned = True
        show(f"step {decision.step}: {decision.reason}")

    def tell(self, report: StepReport) -> None:
        """Look at one exchange and the decision after it."""
        decision = report.decision
        was, self._interval = self._interval, decision.interval
        if decision.unpruned and not self._is_unpruned:
            self._is_unpruned = True
            show(f"step {decision.step}: {decision.reason}")
            return
        goes_on = report.cause is decision.cause is Cause.RAMP
        is_other = decision.density != report.density and not goes_on
        if is_other or decision.interval != was:
            decisions_logger.info("step %d: %s", decision.step, decision.reason)
        if self._budget_s is None:
            return
        if decision.density > self._least:
            self._is_told = False
            return
        step_s = _expected_s(report)
        if step_s is None or step_s <= _MISSED * self._budget_s or self._is_told:
            return
        self._is_told = True
        own_s = None if report.compute_time_s is None else report.compute_time_s / report.steps
        if own_s is not None and own_s >= step_s:  # one slow step, and `step_s` is a typical one
            own_s = None
        decisions_logger.warning(
            "step %d: the budget of %g s per step cannot be met: at the lowest density, %g, a step "
            "takes %.3g s%s. Raise step_time_budget_s%s density.min.",
            decision.step,
            self._budget_s,
            decision.density,
            step_s,
            "" if own_s is None else f", {own_s:.3g} s of them for computation",
            self._advice,
        )


def _expected_s(report: StepReport) -> float | None:
    """How long a step takes from now on: what the law expects, or else what was measured."""
    if report.decision.predicted_step_s is not None:
        return report.decision.predicted_step_s
    return None if report.step_time_s is None else report.step_time_s / report.steps
