"""Runs that nobody has trained: logs as the product writes them, with a story in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ds_gradprune.deepspeed.monitor import StepLog, as_json
from ds_gradprune.law.decision import Cause, Decision
from ds_gradprune.law.signals import StepSignals
from ds_gradprune.train.report import StepReport

NUMEL = 1_000_000
WARMUP, RAMP_END, SLOW, BUSY = 20, 30, 80, 140
"""Steps at which the story turns: pruning begins, the ramp ends, the link slows, hosts get busy."""


def report_at(step: int, every: int = 1) -> StepReport:
    """One exchange of the story."""
    is_dense = step <= WARMUP
    density = _density(step)
    rate = (10.0 if step < SLOW - 1 else 2.0) * 125e3
    steps = 1 if is_dense else every
    compute_s, wire_bytes, wire_s = _times(step)
    cause = _cause(step)
    after = step + (1 if step < WARMUP else every)
    following = Decision(
        step=after,
        density=_density(after),
        cause=_cause(after),
        reason="density 0.05 -> 0.01 over its budget",
        performance=0.3 if step > 30 else None,
        budget_s=0.5,
        network_changed=after in (SLOW, BUSY),
        predicted_step_s=0.4,
        rate_bytes_per_s=None if step < 3 else rate,
    )
    return StepReport(
        step=step,
        steps=steps,
        loss=2.0 + 5.0 * math.exp(-step / 60) + 0.08 * math.sin(7.0 * step),
        performance=following.performance,
        density=density,
        cause=cause,
        step_time_s=(compute_s + (0.0 if is_dense else 0.03) / steps) * steps + 0.7 * wire_s,
        compute_time_s=compute_s * steps,
        codec_time_s=0.0 if is_dense else 0.03,
        comm_time_s=0.7 * wire_s,
        hidden_time_s=0.0 if is_dense else 0.3 * wire_s,
        wire_bytes=wire_bytes,
        dense_bytes=4 * NUMEL,
        nonfinite=False,
        signals=_signals(step, density, steps),
        decision=following,
        senders=2,
    )


def _times(step: int) -> tuple[float, int, float]:
    """Seconds of computation, bytes, and seconds of an exchange, from before the law notices."""
    is_busy = step >= BUSY - 3
    compute_s = (0.45 if is_busy else 0.2) * (1.0 + 0.05 * math.sin(step))
    wire_bytes = 4 * NUMEL if step <= WARMUP else int(1.3 * _density(step) * NUMEL)
    rate = (10.0 if step < SLOW - 4 else 2.0) * 125e3
    return compute_s, wire_bytes, wire_bytes / rate * (1.5 if is_busy else 1.0)


def _signals(step: int, density: float, steps: int) -> StepSignals:
    """What all ranks told in an exchange: times of the one before."""
    compute_s, wire_bytes, wire_s = _times(max(1, step - steps))
    return StepSignals(
        step,
        2.0,
        False,
        density,
        compute_s * steps,
        0.03,
        wire_s,
        None,
        wire_bytes,
        4 * NUMEL,
        interval=steps,
    )


def _density(step: int) -> float:
    if step <= WARMUP:
        return 1.0
    if step <= RAMP_END:
        return 0.25 * (0.2 ** ((step - WARMUP) / (RAMP_END - WARMUP)))
    return 0.05 if step < SLOW else 0.02 if step < 110 else 0.03 if step < BUSY else 0.012


def _cause(step: int) -> Cause:
    named = {
        SLOW: Cause.NETWORK_CHANGED,
        110: Cause.BUDGET_ROOM,
        BUSY: Cause.NETWORK_CHANGED,
    }
    if step <= WARMUP:
        return Cause.WARMUP
    if step <= RAMP_END:
        return Cause.RAMP
    return named.get(step, Cause.HOLD)


def write_run(
    folder: Path,
    *,
    steps: int = 200,
    every: int = 1,
    budget_s: float | None = None,
    prune: str = "update",
) -> Path:
    """A run folder as launch/train.py leaves it."""
    log = StepLog(str(folder / "log.jsonl"))
    numbers = [*range(1, WARMUP + 1), *range(WARMUP + every, steps + 1, every)]
    for step in numbers:
        log.write(report_at(step, every))
    log.close()
    block = {"prune": prune, "step_time_budget_s": budget_s, "sync_every": every}
    (folder / "config.json").write_text(json.dumps({"gradient_pruning": block}))
    losses = [[s, 2.1 + 5.0 * math.exp(-s / 60)] for s in range(0, steps + 1, 50)]
    (folder / "result.json").write_text(json.dumps({"val_losses": losses}))
    return folder


def write_dense_run(folder: Path, steps: int = 200) -> Path:
    """A run without pruning, as launch/train.py leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": s, "loss": 2.0 + 5.0 * math.exp(-s / 70), "step_time_s": 0.55}
        for s in range(1, steps + 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps({"gradient_pruning": {"enabled": False}}))
    return folder


def lines_of(*reports: StepReport) -> list[dict[str, Any]]:
    """Reports as the lines of a log."""
    return [as_json(report) for report in reports]
