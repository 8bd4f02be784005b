"""What one rank of islands finds out at every ZeRO stage, for tests/deepspeed/test_zero_islands."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import google_crc32c
import torch
import torch.distributed as dist

from tests.helpers.shard_bench import start_deepspeed, weights_of
from tests.helpers.zero_bench import DENSE, PRUNED, SGD, everywhere, farthest, make, train, way

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
KINDS: dict[str, dict[str, Any]] = {
    "0-fp32": {"stage": 0},
    "0-bf16": {"stage": 0, "dtype": "bf16"},
    "0-fp16": {"stage": 0, "dtype": "fp16"},
    "1-fp32": {"stage": 1},
    "1-bf16": {"stage": 1, "dtype": "bf16"},
    "1-fp16": {"stage": 1, "dtype": "fp16"},
    "1-fp32-sums": {
        "stage": 1,
        "dtype": "bf16",
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "2-fp32": {"stage": 2},
    "2-fp16": {"stage": 2, "dtype": "fp16"},
    "2-offload": {"stage": 2, "dtype": "bf16", "zero": OFFLOAD},
    "3-fp32": {"stage": 3},
    "3-bf16": {"stage": 3, "dtype": "bf16"},
    "3-fp16": {"stage": 3, "dtype": "fp16"},
    "3-offload": {
        "stage": 3,
        "dtype": "bf16",
        "zero": OFFLOAD | {"offload_param": {"device": "cpu"}},
    },
}


STEPS = 4
"""Of the runs that are compared with plain DeepSpeed."""


def warms_up(ranks: int, options: dict[str, Any]) -> dict[str, Any]:
    """The dense warm-up, and a dense exchange of updates, beside plain DeepSpeed."""
    options = options | SGD
    plain, largest = way(make(None, **options), STEPS)
    warm = make(PRUNED | {"warmup_steps": 99}, ranks=ranks, **options)
    warmed, _ = way(warm, STEPS)
    crcs = everywhere(warm.gradprune.parameters_crc())
    dense, _ = way(make(DENSE, ranks=ranks, **options), STEPS)
    return {
        "weight": max(float(w.abs().max()) for w in plain.values()),
        "step": largest,
        "warm": farthest(plain, warmed),
        "dense": farthest(plain, dense),
        "crcs": crcs,
    }


def shares(
    ranks: int,
    options: dict[str, Any],
    steps: int = 10,
    model: Callable[[], Any] | None = None,
    **block: Any,
) -> dict[str, Any]:
    """Islands at 1 %: what is equal where, after every step."""
    module = None if model is None else model()
    engine = make(PRUNED | block, ranks=ranks, model=module, **options)
    handle = engine.gradprune
    rows: list[Any] = []

    def on_step(step: int) -> None:
        weights = handle.islands.weights
        own = [float(p.own.double().sum()) for p in handle.shards.pieces()]
        rows.append(
            {
                "shared": handle.parameters_crc(),
                "own": own,
                "density": handle.loop.decision.density,
                "finite": weights.is_finite(),
            }
        )

    losses = train(engine, 1, steps, on_step)
    columns = everywhere((rows, losses))
    world = dist.get_world_size()
    groups = [[columns[r][0] for r in range(i, world, ranks)] for i in range(ranks)]

    def equal(group: list[Any], name: str) -> list[bool]:
        return [all(r[s][name] == group[0][s][name] for r in group) for s in range(steps)]

    mean = [sum(column[1][s] for column in columns) / world for s in range(steps)]
    crcs = everywhere(crc_of(weights_of(engine)))
    islands = [set(crcs[first : first + ranks]) for first in range(0, world, ranks)]
    return {
        "islands": [len(island) for island in islands],
        "shared": all(all(equal(group, "shared")) for group in groups),
        "moves": [len({row["shared"] for row in group[0]}) for group in groups],
        "own": [equal(group, "own") for group in groups],
        "density": len({str([r["density"] for r in c[0]]) for c in columns}) == 1,
        "densities": [row["density"] for row in rows],
        "losses": (sum(mean[:3]) / 3, sum(mean[-3:]) / 3),
        "steps": [engine.global_steps, handle.loop.step],
        "bytes": (handle.totals.wire_bytes, handle.totals.dense_bytes),
    }


def crc_of(weights: dict[str, torch.Tensor]) -> int:
    """Over the bits of all weights."""
    crc = 0
    for weight in weights.values():
        flat = weight.contiguous().view(-1).view(torch.uint8).numpy()
        crc = google_crc32c.extend(crc, flat)
    return int(crc)


def run_kinds(ranks: int, kinds: list[str] | None = None) -> dict[str, Any]:
    """Islands of so many ranks: every check on every kind of engine."""
    start_deepspeed()

    def checks(kind: str) -> Iterator[tuple[str, Any]]:
        yield "warms_up", warms_up(ranks, KINDS[kind])
        yield "shares", shares(ranks, KINDS[kind] | {"gradient_accumulation_steps": 2})

    return collect(checks, kinds or [*KINDS])


def collect(checks: Callable[[str], Iterator[tuple[str, Any]]], kinds: list[str]) -> dict[str, Any]:
    """Kind -> check -> what it found; a failed check leaves its traceback and ends the run."""
    found: dict[str, Any] = {}
    for kind in kinds:
        found[kind] = {}
        begin = time.monotonic()
        try:
            found[kind].update(checks(kind))
        except Exception:
            found[kind]["fault"] = traceback.format_exc()
            break
        finally:
            found[kind]["seconds"] = time.monotonic() - begin
    return found
