"""A run as its log tells it: series for pictures, rows for reports, words for decisions.

A run is a folder with log.jsonl, and perhaps config.json and validation.json beside it, or a log
alone. Nothing here draws.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ds_gradprune.config import BLOCK
from ds_gradprune.deepspeed.monitor import read_log
from ds_gradprune.errors import DataError

Mode = Literal["update", "gradient", "dense"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One exchange. Times are seconds per optimizer step.

    Attributes:
        step: the optimizer step that it followed.
        interval: steps since the exchange before.
        seconds: of training since the log began, to its end.
        loss: None: unknown.
        density: as used; 1.0: dense; None: a run without pruning.
        performance: P(t); None: unknown.
        compute_s: None: unknown.
        codec_s: select, encode, decode, apply.
        wire_s: waiting for the exchange.
        hidden_s: of the exchange, while the computation went on.
        whole_s: of a step of DeepSpeed alone, whose exchange nobody timed apart; else 0.
        wire_bytes: sent by the rank that wrote the log; of the whole interval.
        dense_bytes: without pruning; of the whole interval.
        link_mbit: as the law saw it; None: unknown.
        cause: which rule had set the density.
        next_density: decided for the next exchange.
        next_cause: which rule decided.
        next_unpruned: the next exchange is one of an unpruned warm-up.
        budget_s: of a step, as applied to the decision; None: none.
        has_changed: the law noticed that exchanges cost something else than before.
        told_compute_s: computation of the slowest rank before the exchange before this one, as all
            ranks have told it here; None: unknown.
        told_exchange: bytes and seconds of that exchange, without waiting for the last rank; None:
            unknown.
    """

    step: int
    interval: int
    seconds: float
    loss: float | None
    density: float | None
    performance: float | None
    compute_s: float | None
    codec_s: float
    wire_s: float
    hidden_s: float
    whole_s: float
    wire_bytes: int
    dense_bytes: int
    link_mbit: float | None
    cause: str
    next_density: float | None
    next_cause: str
    next_unpruned: bool
    budget_s: float | None
    has_changed: bool
    told_compute_s: float | None = None
    told_exchange: tuple[int, float] | None = None

    @property
    def step_s(self) -> float:
        """Seconds of a step, as far as they are known."""
        return (self.compute_s or 0.0) + self.codec_s + self.wire_s + self.whole_s

    @property
    def is_move(self) -> bool:
        """The decision after it changes the density."""
        return self.next_density is not None and self.next_density != self.density


@dataclass(frozen=True, slots=True)
class Run:
    """A run.

    Attributes:
        name: for a legend.
        mode: what was pruned; None: no configuration lies beside the log.
        budget_s: that the user gave for a step; None: none.
        entries: exchanges, in order; at least one.
        validation: (step, loss), of the weights that all ranks share.
        config: DeepSpeed's configuration; empty: unknown.
    """

    name: str
    mode: Mode | None
    budget_s: float | None
    entries: tuple[Entry, ...]
    validation: tuple[tuple[int, float], ...]
    config: dict[str, Any]

    @property
    def loss_name(self) -> str:
        """What its training loss is called: islands train on weights of their own."""
        return "own training loss" if self.mode == "update" else "training loss"

    def seconds_at(self, step: int) -> float:
        """Seconds of training when a step had ended."""
        done = [entry.seconds for entry in self.entries if entry.step <= step]
        return done[-1] if done else 0.0


def read_run(path: Path) -> Run:
    """Read a run.

    Args:
        path: its folder, or its log.

    Raises:
        DataError: there is no log, or no step in it.
    """
    folder, log = (path, path / "log.jsonl") if path.is_dir() else (path.parent, path)
    try:
        lines = list(read_log(str(log)))
    except OSError as exc:
        raise DataError(
            f"{path} must be a run folder with log.jsonl, or a log, but {log} cannot be read: "
            f'{exc.strerror}. "log_path" in the gradient_pruning block writes one.'
        ) from exc
    if not lines:
        raise DataError(f"{log} must hold at least one step, but holds none.")
    config = _document(folder / "config.json") if path.is_dir() else {}
    block = config.get(BLOCK) or {}
    names = ("validation.json", "result.json") if path.is_dir() else ()
    result = next(filter(None, (_document(folder / name) for name in names)), {})
    return Run(
        name=path.name if path.is_dir() else path.stem,
        mode=_mode(block, lines),
        budget_s=block.get("step_time_budget_s"),
        entries=_entries(lines),
        validation=tuple((int(s), float(v)) for s, v in result.get("val_losses", ())),
        config=config,
    )


def _document(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _mode(block: dict[str, Any], lines: Sequence[dict[str, Any]]) -> Mode | None:
    if "density" not in lines[0]:
        return "dense"
    mode: Mode | None = block.get("prune")
    return mode


def _entries(lines: Sequence[dict[str, Any]]) -> tuple[Entry, ...]:
    entries, seconds = [], 0.0
    for line in lines:
        spent = {f: line.get(f) or 0.0 for f in ("compute_time_s", "codec_time_s", "comm_time_s")}
        whole_s = (line.get("step_time_s") or 0.0) if "density" not in line else 0.0
        seconds += sum(spent.values()) + whole_s
        entries.append(_entry(line, seconds, whole_s))
    return tuple(entries)


def _entry(line: dict[str, Any], seconds: float, whole_s: float) -> Entry:
    """One line of the log, per optimizer step."""
    steps = max(1, int(line.get("steps") or 1))
    decision = line.get("decision") or {}

    def each(value: float | None) -> float | None:
        return None if value is None else value / steps

    rate = decision.get("rate_bytes_per_s")
    told = line.get("signals") or {}
    told_s = told.get("compute_time_s")
    exchange = (told.get("wire_bytes") or 0, told.get("comm_time_s") or 0.0)
    return Entry(
        step=line["step"],
        interval=steps,
        seconds=seconds,
        loss=line.get("loss"),
        density=line.get("density"),
        performance=line.get("performance"),
        compute_s=each(line.get("compute_time_s")),
        codec_s=each(line.get("codec_time_s")) or 0.0,
        wire_s=each(line.get("comm_time_s")) or 0.0,
        hidden_s=each(line.get("hidden_time_s")) or 0.0,
        whole_s=whole_s / steps,
        wire_bytes=line.get("wire_bytes") or 0,
        dense_bytes=line.get("dense_bytes") or 0,
        link_mbit=None if rate is None else 8e-6 * rate,
        cause=line.get("cause") or "",
        next_density=decision.get("density"),
        next_cause=decision.get("cause") or "",
        next_unpruned=bool(decision.get("unpruned")),
        budget_s=decision.get("budget_s"),
        has_changed=bool(decision.get("network_changed")),
        told_compute_s=None if told_s is None else told_s / max(1, told.get("interval") or 1),
        told_exchange=exchange if all(exchange) else None,
    )


# ---- sums ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sums:
    """Of a whole run.

    Attributes:
        steps: the last one.
        seconds: of training.
        compute_s: of them.
        codec_s: of them.
        wire_s: of them, waiting for exchanges.
        hidden_s: of exchanges, beside the computation.
        whole_s: of steps whose exchange nobody timed apart.
        wire_bytes: sent by the rank that wrote the log.
        dense_bytes: without pruning.
        last_loss: mean training loss of the last tenth of the exchanges; None: unknown.
    """

    steps: int
    seconds: float
    compute_s: float
    codec_s: float
    wire_s: float
    hidden_s: float
    whole_s: float
    wire_bytes: int
    dense_bytes: int
    last_loss: float | None


def sums(run: Run) -> Sums:
    """Add a run up."""
    entries = run.entries
    losses = [e.loss for e in entries[-max(1, len(entries) // 10) :] if e.loss is not None]
    return Sums(
        steps=entries[-1].step,
        seconds=entries[-1].seconds,
        compute_s=sum((e.compute_s or 0.0) * e.interval for e in entries),
        codec_s=sum(e.codec_s * e.interval for e in entries),
        wire_s=sum(e.wire_s * e.interval for e in entries),
        hidden_s=sum(e.hidden_s * e.interval for e in entries),
        whole_s=sum(e.whole_s * e.interval for e in entries),
        wire_bytes=sum(e.wire_bytes for e in entries),
        dense_bytes=sum(e.dense_bytes for e in entries),
        last_loss=statistics.mean(losses) if losses else None,
    )


def means(values: Sequence[float], most: int) -> list[float]:
    """The values in at most so many groups of neighbours, each one's mean."""
    size = -(-len(values) // most)
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    return [statistics.fmean(group) for group in groups]


def mbit(rate: float) -> str:
    """A rate of a link for a user: three digits, no exponent."""
    return f"{float(f'{rate:.3g}'):,.10g}"
