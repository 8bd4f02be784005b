"""Engines of three islands, one of which is gone after some steps."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch

from ds_gradprune.errors import GradPruneError
from tests.helpers.ds_main import batch, make_engine

BLOCK = {
    "min_islands": 2,
    "warmup_steps": 3,
    "ramp_steps": 0,
    "window_size": 4,
    "timeout_s": 10.0,
    "density": {"initial": 0.05, "min": 0.05, "max": 0.05},
}


def train_on(
    block: dict[str, Any],
    lost: int,
    at: int,
    steps: int,
    folder: str,
    before: str = "",
    **options: Any,
) -> dict[str, Any]:
    """Train, and save after the last step; the lost island ends after a step.

    Args:
        block: beside `BLOCK`.
        lost: a rank.
        at: its last step.
        before: a call of its channel in that step, which it does not make; else it ends it.
        steps: of the others.
        folder: for checkpoints and the log.
        options: of the engine.
    """
    rank = int(os.environ["RANK"])
    told: dict[str, Any] = {"crc": [], "senders": [], "warnings": [], "longest_s": 0.0}
    handler = logging.Handler()
    handler.emit = lambda record: told["warnings"].append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ds_gradprune").addHandler(handler)
    log = {"log_path": str(Path(folder) / f"steps_{rank}.jsonl")}
    engine = make_engine(BLOCK | log | block, "islands", **options)
    handle = engine.gradprune
    if before and rank == lost:
        _end_before(handle, before, at)
    try:
        for step in range(1, steps + 1):
            began_s = time.monotonic()
            for micro_step in range(engine.gradient_accumulation_steps()):
                engine.backward(engine(batch(step, micro_step, rank)))
                engine.step()
            told["longest_s"] = max(told["longest_s"], time.monotonic() - began_s)
            told["crc"].append(handle.parameters_crc())
            told["law"] = handle.loop.decision
            told["senders"].append(None if handle.report is None else handle.report.senders)
            if (rank, step) == (lost, at):
                return told
        engine.save_checkpoint(folder, tag="end", client_state={"steps": steps})
        told["saved"] = sorted(path.name for path in (Path(folder) / "end").iterdir())
        told["latest"] = (Path(folder) / "latest").read_text()
        told["weight"] = float(torch.cat([p.view(-1) for p in _shared(engine)]).double().sum())
        handle.detach()
    except (GradPruneError, _Gone) as exc:
        told["fault"] = f"{type(exc).__name__}: {exc}"
        told["ended_s"] = time.monotonic() - began_s
    return told


class _Gone(BaseException):
    """The process has ended."""


def _end_before(handle: Any, name: str, step: int) -> None:
    """A call of the channel is the last that this rank comes to."""
    original = getattr(handle.channel, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if handle.loop.exchange_step == step:
            raise _Gone
        return original(*args, **kwargs)

    setattr(handle.channel, name, call)


def _shared(engine: Any) -> list[torch.Tensor]:
    with engine.gradprune.shared_weights():
        return [parameter.detach().clone() for parameter in engine.module.parameters()]
