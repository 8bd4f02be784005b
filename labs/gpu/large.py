"""124M parameters from nothing, and SmolLM2's shape: losses, seconds by part, bytes a parameter.

All functions are collective. The dense runs are plain DeepSpeed over both ranks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from labs.gpu.engines import (
    PRUNED,
    Job,
    batch,
    close,
    device,
    everywhere,
    gpt2,
    median,
    smollm2,
    text,
    train,
)

WAYS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "pruned": {"density": {"initial": 0.05, "min": 0.05, "max": 0.05}},
    "hidden": {"density": {"initial": 0.05, "min": 0.05, "max": 0.05}, "overlap": "auto"},
    "reset": {"density": {"initial": 0.05, "min": 0.05, "max": 0.05}, "sync_every": 4},
    "cpu": {
        "density": {"initial": 0.05, "min": 0.05, "max": 0.05},
        "shared_device": "cpu",
    },
    "whole": {
        "density": {"initial": 1.0, "min": 1.0, "max": 1.0},
        "value_bits": 32,
        "warmup_steps": 0,
    },
}
"""Name -> our block; None: plain DeepSpeed."""

UNTIMED_STEPS = 3
"""The first steps allocate, and warm up."""


def shape(name: str, tiny: bool) -> Any:
    """What makes the model."""
    if name == "smollm2":
        return partial(smollm2, 10 if tiny else 1)
    if tiny:
        return partial(gpt2, 64, 2, 2, 512, 128)
    return partial(gpt2, 768, 12, 12, 50257, 1024)


def run(
    model: str,
    stage: int,
    way: str,
    steps: int,
    tiny: bool = False,
    rate_mbit: float | None = None,
    learns: bool = True,
) -> dict[str, Any]:
    """Train one model in one way.

    Args:
        model: "gpt2" or "smollm2".
        stage: of ZeRO.
        way: a key of WAYS.
        steps: optimizer steps.
        tiny: a small model of the same kind.
        rate_mbit: of an emulated link between islands; None: none is emulated. The first step is
            not slowed.
        learns: the losses must fall.
    """
    job = Job(
        shape(model, tiny),
        stage,
        "bf16",
        rows=2 if tiny else 8,
        length=64 if tiny else 512,
        extra={"optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "torch_adam": True}}},
    )
    memory, untimed = Memory(), min(UNTIMED_STEPS, steps - 1)
    engine = job.engine(_block(way, rate_mbit))
    numel = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    source, times_s, parts = text(), list[float](), Parts(untimed)
    handle = getattr(engine, "gradprune", None)

    def on_step(step_s: float) -> None:
        times_s.append(step_s)
        if handle is not None:
            parts.note(handle.report)

    losses = train(engine, job, source, 1, steps, on_step)
    found = memory.found(numel) | _of_handle(handle, numel) | parts.found()
    columns = everywhere((losses, None if handle is None else handle.parameters_crc()))
    mean = [sum(c[0][s] for c in columns) / len(columns) for s in range(steps)]
    ends = [sum(mean[:3]) / 3, sum(mean[-3:]) / 3]
    found |= {
        "numel": numel,
        "steps": steps,
        "step_s": median(times_s[untimed:]),
        "losses": ends,
        "validation_loss": _validate(engine, job, source),
        "checks": {"shared weights are equal": len({c[1] for c in columns}) == 1},
    }
    if learns:
        found["checks"]["losses fall"] = ends[1] < ends[0]
    close(engine)
    return found


def _block(way: str, rate_mbit: float | None) -> dict[str, Any] | None:
    """Our block; None: plain DeepSpeed."""
    block = WAYS[way]
    if block is None:
        return None
    block = PRUNED | {"verify_every_steps": None} | block
    if rate_mbit is None:
        return block
    schedule = [{"step": 0, "rate_mbit": 1e5}, {"step": 2, "rate_mbit": rate_mbit}]
    return block | {"warmup_steps": 0, "throttle": {"schedule": schedule}}


def _of_handle(handle: Any, numel: int) -> dict[str, Any]:
    """What our side holds; nothing is under way afterwards."""
    if handle is None:
        return {}
    handle.rounds.land()
    return {
        "held_bytes_per_parameter": handle.held_bytes / numel,
        "shared_lies_on": str(handle.islands.weights.stores[0].device),
    }


@torch.no_grad()
def _validate(engine: Any, job: Job, source: torch.Tensor) -> float:
    """Mean loss over the same batches in every way; islands use the shared weights."""
    engine.eval()
    losses = []
    for number in range(4):
        tokens = batch(source, 10**6 + number, job.rows, job.length)
        losses.append(float(engine(input_ids=tokens, labels=tokens).loss))
    engine.train()
    answers: list[float] = everywhere(sum(losses) / len(losses))
    return answers[0]


class Memory:
    """What is allocated on the device from now on; nothing is known without a GPU."""

    def __init__(self) -> None:
        self._is_known = device().type == "cuda"
        self._before_bytes = 0
        if self._is_known:
            torch.cuda.reset_peak_memory_stats()
            self._before_bytes = torch.cuda.memory_allocated()

    def found(self, numel: int) -> dict[str, Any]:
        """Bytes for every parameter: at rest between two steps, and at the highest."""
        if not self._is_known:
            return {}
        rest = torch.cuda.memory_allocated() - self._before_bytes
        peak = torch.cuda.max_memory_allocated() - self._before_bytes
        return {
            "rest_bytes_per_parameter": rest / numel,
            "peak_bytes_per_parameter": peak / numel,
            "before_bytes": self._before_bytes,
        }


class Parts:
    """An exchange by part, as the reports say.

    Args:
        untimed: so many steps at the start do not count.
    """

    def __init__(self, untimed: int) -> None:
        self._untimed = untimed
        self._rows: dict[int, Any] = {}

    def note(self, report: Any) -> None:
        """The last report; the same one twice counts once."""
        if report is not None and report.step > self._untimed:
            self._rows[report.step] = report

    def found(self) -> dict[str, Any]:
        """Medians: seconds of every part, and bytes that a rank has sent."""
        rows = list(self._rows.values())
        if not rows:
            return {}
        names = ("compute", "codec", "comm", "hidden")
        return {
            "parts_s": {
                name: median([t for r in rows if (t := getattr(r, f"{name}_time_s")) is not None])
                for name in names
            },
            "wire_bytes": median([float(row.wire_bytes) for row in rows]),
            "dense_bytes": median([float(row.dense_bytes) for row in rows]),
        }
