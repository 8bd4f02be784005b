"""What a run shows while it trains: its lines, and its validations, on disk and in monitors."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ds_gradprune.commands.runlog import mbit
from ds_gradprune.deepspeed.validation import write_validation

from .run_folder import write_json

DECISION_LINES, BURST = 40, 8
"""Of the law's changes a run shows about so many, however long it is, and so many in a row. All of
them are in its log."""


def say(text: str) -> None:
    """Show one line to the user, not behind a bar."""
    tqdm.write(text, file=sys.stderr)


class Messages(logging.Handler):
    """Our library's warnings and decisions as plain lines.

    Args:
        steps: of the whole run.

    Attributes:
        show: shows one; replaced while a bar is on the screen.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.show: Callable[[str], None] = say
        self._every = max(1, steps // DECISION_LINES)
        self._free_from = 0  # as if the lines so far had come evenly, up to this step
        self._left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        text = record.getMessage()
        if record.levelno == logging.INFO and isinstance(record.args, tuple) and record.args:
            step = record.args[0]
            if isinstance(step, int) and not self._may_show(step):
                self._left_out += 1
                return
            if self._left_out:
                text += f"; {self._left_out} changes before it are in the log only"
                self._left_out = 0
        self.show(text)

    def _may_show(self, step: int) -> bool:
        if self._free_from > step + BURST * self._every:
            return False
        self._free_from = max(self._free_from, step) + self._every
        return True


def live_fields(handle: Any, record: Any, tokens_per_step: int) -> dict[str, str]:
    """The fields of the live line. Local.

    Args:
        handle: `engine.gradprune`; None: nothing is pruned.
        record: the step, a `textgen.train.StepRecord`.
        tokens_per_step: of all ranks together.
    """
    report = None if handle is None else handle.report
    loss, name = record.loss, "loss"
    if report is not None:
        loss = record.loss if report.loss is None else report.loss
        # Islands train on weights of their own: the loss of the shared ones is another.
        name = "own loss" if handle.config.prune == "update" else "loss"
    fields = {name: f"{loss:.3f}"}
    if report is not None:
        rate = report.decision.rate_bytes_per_s
        fields |= {
            "P": "-" if report.performance is None else f"{report.performance:.2f}",
            "density": f"{100 * report.density:.2f} %",
            "sent": f"{report.wire_bytes / 1e6:.2f} MB",
            "link": "-" if rate is None else f"{mbit(8e-6 * rate)} Mbit/s",
        }
    return fields | {"tokens/s": f"{tokens_per_step / record.step_time_s:,.0f}"}


class Validations:
    """The validation losses of a run, written as they come, so that a running run can be drawn.

    Args:
        path: JSON with `val_losses` and `own_val_losses`, each (step, loss) in order.
        engine: whose monitors get them.
    """

    def __init__(self, path: Path, engine: Any) -> None:
        self._path = path
        self._engine = engine
        self._own: list[list[float]] = []

    def resume(self, step: int) -> None:
        """Keep what an earlier part of the run has measured up to a step."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            own = json.loads(self._path.read_text(encoding="utf-8"))["own_val_losses"]
            self._own = [[s, loss] for s, loss in own if s <= step]

    def add(self, val_losses: list[tuple[int, float]], own_loss: float | None) -> None:
        """Write the newest. Local, for rank 0.

        Args:
            val_losses: all so far.
            own_loss: what the own weights of the islands lose on the same text, on average.

        Raises:
            DataError: the disk refuses.
        """
        step, loss = val_losses[-1]
        if own_loss is not None:
            self._own.append([step, own_loss])
        write_json(self._path, {"val_losses": val_losses, "own_val_losses": self._own})
        write_validation(self._engine, loss, own_loss)
