"""Where a pruned step on a GPU goes, with nothing of the computation left in it.

Before every measured `engine.step()` the device is idle and the ranks have met, so no kernel of the
backward pass, and no other rank's, is waited for in it. All functions are collective.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from labs.gpu.engines import PRUNED, Job, batch, close, median, synchronize, text
from labs.gpu.large import WAYS, shape

STEPS, WARM_STEPS, LINES = 8, 5, 45
PARTS = ("compute", "codec", "comm", "hidden")


def run(model: str, stage: int, way: str, tiny: bool, folder: str) -> dict[str, Any]:
    """Measure, then profile, the second half of a step.

    Args:
        model: as for `labs.gpu.large.shape`.
        stage: of ZeRO.
        way: a key of `labs.gpu.large.WAYS`.
        tiny: a small model of the same kind.
        folder: rank 0's tables are written there.
    """
    block = WAYS[way]
    job = Job(shape(model, tiny), stage, "bf16", rows=2 if tiny else 8, length=64 if tiny else 512)
    more = None if block is None else PRUNED | {"verify_every_steps": None} | block
    engine, source, number = job.engine(more), text(), [0]
    found: dict[str, list[float]] = {}

    def learn() -> None:
        number[0] += 1
        tokens = batch(source, 1000 * number[0] + dist.get_rank(), job.rows, job.length)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        synchronize()
        dist.barrier()

    def timed() -> None:
        began_s = time.perf_counter()
        learn()
        found.setdefault("learn_s", []).append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
        engine.step()
        synchronize()
        found.setdefault("step_s", []).append(time.perf_counter() - began_s)
        report = getattr(getattr(engine, "gradprune", None), "report", None)
        if report is not None:
            for name in PARTS:
                found.setdefault(name, []).append(getattr(report, f"{name}_time_s") or 0.0)

    for _ in range(WARM_STEPS):
        learn()
        engine.step()
    for _ in range(STEPS):
        timed()
    tables = [_python(engine, learn), _device(engine, learn)]
    if dist.get_rank() == 0:
        path = Path(folder) / f"profile_{model}_{stage}_{way}.txt"
        path.write_text("\n\n".join(tables))
    close(engine)
    medians = {name: median(values) for name, values in found.items()}
    parts = {name: medians.pop(name) for name in PARTS if name in medians}
    return medians | {
        "parts_s": parts,
        "checks": {"profiled": True},
        "tables": tables[1].splitlines()[:LINES],
        "python": tables[0].splitlines()[:LINES],
    }


def _python(engine: Any, learn: Any) -> str:
    """Two steps by function of Python, main thread."""
    profiler = cProfile.Profile()
    for _ in range(2):
        learn()
        profiler.enable()
        engine.step()
        synchronize()
        profiler.disable()
    told = io.StringIO()
    pstats.Stats(profiler, stream=told).sort_stats("tottime").print_stats(LINES)
    pstats.Stats(profiler, stream=told).sort_stats("cumulative").print_stats(2 * LINES)
    return told.getvalue()


def _device(engine: Any, learn: Any) -> str:
    """One step by kernel and by operator."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    learn()
    with profile(activities=activities) as trace:
        engine.step()
        synchronize()
    averages = trace.key_averages()
    by_cpu = averages.table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60)
    if not torch.cuda.is_available():
        return by_cpu
    by_device = averages.table(
        sort_by="self_device_time_total", row_limit=30, max_name_column_width=60
    )
    return f"{by_device}\n{by_cpu}"
