"""Checks on a small model: equal where it must be equal, at every stage and in every way.

Every function returns a mapping; `checks` in it holds what must be true. All are collective.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.train.crc import crc_of
from labs.gpu.engines import (
    DENSE,
    PRUNED,
    SGD,
    Job,
    close,
    device,
    everywhere,
    text,
    train,
    weights_of,
)

ROUNDED = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""Largest relative error of rounding a number."""

STEPS = 4
"""Of the runs that are compared with plain DeepSpeed."""


def exact(stage: int, dtype: str) -> dict[str, Any]:
    """The dense warm-up, and density 1.0 at 32 bits, beside plain DeepSpeed in the same run."""
    job = Job(stage=stage, dtype=dtype, extra=SGD)
    plain, largest = _way(job, None)
    warm, _ = _way(job, PRUNED | {"warmup_steps": 99})
    dense, _ = _way(job, DENSE)
    # As derived in tests/deepspeed/test_zero_islands.py: gradients of the ranks are added and
    # scaled, fp32 weights rounded a few times per step, copies of lower precision once.
    weight = max(float(w.abs().max()) for w in plain.values())
    times = 4 * STEPS if dtype == "fp32" else 1
    limit = 2 * ROUNDED[dtype] * (8 * STEPS * largest + times * weight)
    apart = {"warm": _farthest(plain, warm), "dense": _farthest(plain, dense)}
    return {
        "apart": apart,
        "limit": limit,
        "largest_step": largest,
        "checks": {
            "the warm-up is plain DeepSpeed's": apart["warm"] <= limit,
            "density 1.0 is plain DeepSpeed's": apart["dense"] <= limit,
            "weights have moved": largest > 0.0,
        },
    }


def _way(job: Job, block: dict[str, Any] | None) -> tuple[dict[str, torch.Tensor], float]:
    """Weights after a few steps, and the largest step that one has made."""
    engine, source, largest = job.engine(block), text(), 0.0
    before = weights_of(engine)
    for number in range(1, STEPS + 1):
        train(engine, job, source, number, number)
        after = weights_of(engine)
        largest = max(largest, _farthest(before, after))
        before = after
    close(engine)
    return before, largest


def _farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[n].float() - other[n].float()).abs().max()) for n in one)


def shares(
    stage: int,
    dtype: str,
    steps: int = 12,
    ranks: int | None = None,
    extra: dict[str, Any] | None = None,
    **block: Any,
) -> dict[str, Any]:
    """Islands at 1 %: what is shared is equal on all of them after every step; losses fall.

    Args:
        stage: of ZeRO.
        dtype: of the weights.
        steps: how many.
        ranks: of an island; None: as the launcher says.
        extra: further keys of the DeepSpeed configuration.
        block: further keys of ours.
    """
    job = Job(stage=stage, dtype=dtype, extra=extra or {})
    engine = job.engine(PRUNED | {"island": {"ranks": ranks}} | block)
    handle = engine.gradprune
    shared: list[int] = []
    losses = train(engine, job, text(), 1, steps, lambda _: shared.append(handle.parameters_crc()))
    handle.rounds.land()
    shared.append(handle.parameters_crc())
    own = handle.islands.weights.own_crc()
    size, report = ranks or 1, handle.report
    columns = everywhere((shared, losses, own, handle.islands.weights.is_finite()))
    groups = [columns[index::size] for index in range(size)]
    mean = [sum(c[1][s] for c in columns) / len(columns) for s in range(steps)]
    first, last = sum(mean[:3]) / 3, sum(mean[-3:]) / 3
    found = {
        "losses": [first, last],
        "exchanges": len(dict.fromkeys(shared)),
        "shared_lies_on": str(handle.islands.weights.stores[0].device),
        "own_lies_on": str(handle.shards.pieces()[0].own.device),
        "held_bytes": handle.held_bytes,
        "wire_bytes": handle.totals.wire_bytes,
        "dense_bytes": handle.totals.dense_bytes,
        "density": report.density,
        "checks": {
            "shared weights are equal after every step": all(
                c[0] == group[0][0] for group in groups for c in group
            ),
            "shared weights move": len(dict.fromkeys(shared)) >= 3,
            "own weights differ": all(len({c[2] for c in group}) > 1 for group in groups),
            "weights are finite": all(c[3] for c in columns),
            "losses fall": last < first,
        },
    }
    close(engine)
    return found


def gradients(stage: int, dtype: str, steps: int = 12, **block: Any) -> dict[str, Any]:
    """Pruned gradients: the model's weights are equal on all ranks after every step."""
    job = Job(stage=stage, dtype=dtype)
    engine = job.engine(PRUNED | {"prune": "gradient"} | block)
    crcs: list[int] = []
    losses = train(
        engine, job, text(), 1, steps, lambda _: crcs.append(crc_of(weights_of(engine).values()))
    )
    columns = everywhere((crcs, losses))
    mean = [sum(c[1][s] for c in columns) / len(columns) for s in range(steps)]
    first, last = sum(mean[:3]) / 3, sum(mean[-3:]) / 3
    totals = engine.gradprune.totals
    found = {
        "losses": [first, last],
        "wire_bytes": totals.wire_bytes,
        "dense_bytes": totals.dense_bytes,
        "residual_norm": engine.gradprune.pruning.residuals.norm(),
        "checks": {
            "weights are equal after every step": all(c[0] == columns[0][0] for c in columns),
            "weights move": len(set(crcs)) == steps,
            "losses fall": last < first,
        },
    }
    close(engine)
    return found


def repeats(stage: int, dtype: str) -> dict[str, Any]:
    """The same run twice: only then can a resumed one be asked for the same bits."""
    job, ends = Job(stage=stage, dtype=dtype), []
    for _ in range(2):
        engine = job.engine(PRUNED)
        losses = train(engine, job, text(), 1, 8)
        ends.append((losses, _end(engine)))
        close(engine)
    return {"checks": {"equal bits": all(one == other for one, other in everywhere(ends))}}


def resumes(stage: int, dtype: str, folder: str, **block: Any) -> dict[str, Any]:
    """A run that was saved and resumed ends where the unbroken one does, bit for bit."""
    job, source = Job(stage=stage, dtype=dtype), text()
    keys = PRUNED | block
    engine = job.engine(keys)
    train(engine, job, source, 1, 6)
    path = os.path.join(folder, f"checkpoint_{stage}_{dtype}_{'_'.join(block) or 'plain'}")
    engine.save_checkpoint(path, tag="six")
    unbroken = train(engine, job, source, 7, 10)
    ends = [_end(engine)]
    close(engine)
    engine = job.engine(keys)
    engine.load_checkpoint(path, tag="six")
    resumed = train(engine, job, source, 7, 10)
    ends.append(_end(engine))
    close(engine)
    dist.barrier()
    columns = everywhere((ends, unbroken, resumed))
    return {
        "losses": [unbroken[-1], resumed[-1]],
        "checks": {
            "shared weights resume bit for bit": all(e[0][0] == e[1][0] for e, *_ in columns),
            "own weights resume bit for bit": all(e[0][1] == e[1][1] for e, *_ in columns),
            "losses resume bit for bit": all(one == other for _, one, other in columns),
            "shared weights are equal": len({e[1][0] for e, *_ in columns}) == 1,
        },
    }


def _end(engine: Any) -> tuple[int, int]:
    engine.gradprune.rounds.land()
    return engine.gradprune.parameters_crc(), engine.gradprune.islands.weights.own_crc()


def alone() -> dict[str, Any]:
    """One rank over nccl: our transport's calls through device memory, and an engine left alone."""
    from ds_gradprune.wire.torchdist import TorchDistTransport

    transport = TorchDistTransport(timeout_s=30)
    payload = torch.arange(300_000, dtype=torch.int32).to(torch.uint8)
    gathered, swapped = torch.empty(1, len(payload), dtype=torch.uint8), payload[None].clone()
    transport.all_gather(payload, gathered)
    answer = torch.empty_like(swapped)
    transport.all_to_all(swapped, answer)
    total = torch.arange(1000.0, device=device())
    transport.all_reduce(total)
    job = Job(stage=2, dtype="bf16")
    engine = job.engine(PRUNED)
    losses = train(engine, job, text(), 1, 8)
    idle = engine.gradprune.idle
    close(engine)
    return {
        "losses": [losses[0], losses[-1]],
        "checks": {
            "all_gather": torch.equal(gathered[0], payload),
            "all_to_all": torch.equal(answer, swapped),
            "all_reduce": torch.equal(total.cpu(), torch.arange(1000.0)),
            "one rank is left alone": idle,
            "losses fall": losses[-1] < losses[0],
        },
    }
