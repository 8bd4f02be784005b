"""Pruned gradients between two islands of two ranks, at ZeRO stages 0 to 2."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from ds_gradprune.deepspeed.attach import attach
from ds_gradprune.deepspeed.groups import Groups
from ds_gradprune.errors import UnsupportedError
from tests.helpers import zero_gradient_cases
from tests.helpers.ranks import run_cases
from tests.helpers.shard_bench import make_engine, start_deepspeed
from tests.helpers.zero_bench import SGD, everywhere, farthest, make, traffic, way
from tests.helpers.zero_features import observed, series
from tests.helpers.zero_gradient_bench import BUCKET, KINDS, PRUNED, train

RANKS = 2
ISLANDS = PRUNED | {"island": {"ranks": RANKS}}
STEPS = 4
DENSE = {"warmup_steps": 0, "density": {"initial": 1.0, "min": 1.0, "max": 1.0}, "value_bits": 32}
ZERO = {"zero": {"reduce_bucket_size": BUCKET}}
DENSE_KINDS: dict[str, dict[str, Any]] = {
    "0-fp32": {"stage": 0},
    "0-bf16": {"stage": 0, "dtype": "bf16"},
    "1-fp32": {"stage": 1} | ZERO,
    "2-fp32": {"stage": 2} | ZERO,
}
STAGE_0: dict[str, dict[str, Any]] = {
    "0-fp32": {"stage": 0, "gradient_clipping": 0.5},
    "0-bf16": {"stage": 0, "dtype": "bf16"},
}


def dense(kind: str) -> dict[str, Any]:
    """Nothing pruned, beside plain DeepSpeed."""
    options = DENSE_KINDS[kind] | SGD
    plain, largest = way(make(None, **options), STEPS)
    ours = make(ISLANDS | DENSE, **options)
    weights, _ = way(ours, STEPS)
    ours.gradprune.detach()
    return {
        "weight": max(float(w.abs().max()) for w in plain.values()),
        "step": largest,
        "apart": farthest(plain, weights),
    }


def crosses(kind: str) -> dict[str, Any]:
    """What joins the two islands in two dense steps and in three pruned ones."""
    engine = zero_gradient_cases.make(ISLANDS, **KINDS[kind])
    handle = engine.gradprune
    trained = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    spare = sum(p.numel() for p in engine.module.spare.parameters())
    # Stage 0 reduces zeros for a layer that got no gradient.
    answers: dict[str, Any] = {"numel": trained - (spare if KINDS[kind]["stage"] else 0)}
    for phase, steps in (("dense", (1, 2)), ("pruned", (3, 5))):
        before = handle.totals.wire_bytes
        with traffic() as seen:
            train(engine, *steps)
        sizes: dict[str, int] = {}
        for name, size, ranks in seen:
            if len({rank // RANKS for rank in ranks}) > 1:
                where = name if len(ranks) == dist.get_world_size() // RANKS else f"all {name}"
                sizes[where] = sizes.get(where, 0) + size
        islands = everywhere(sizes)[:RANKS]
        answers[phase] = {
            "sent": {name: sum(rank.get(name, 0) for rank in islands) for name in sizes},
            "told": handle.totals.wire_bytes - before,
        }
    answers["shares"] = everywhere(handle.held_bytes)
    handle.detach()
    return answers


def pruned(name: str) -> dict[str, Any]:
    """A run, what it owes, and whether its books balance."""
    engine = zero_gradient_cases.make(ISLANDS, **KINDS[name])
    answers: dict[str, Any] = {"run": train(engine, 1, 5)}
    if name in zero_gradient_cases.EXACT:
        answers["lost"] = zero_gradient_cases.balance(engine, 6)
    answers["residual"] = engine.gradprune.pruning.residuals.norm()
    engine.gradprune.detach()
    return answers


def watched(stage: int) -> dict[str, Any]:
    """A batch that grows in mid-run, a monitor, DeepSpeed's profiler and its breakdown."""
    folder = f"{os.environ['DS_TEST_STORE']}_csv_{stage}"
    engine = zero_gradient_cases.make(ISLANDS, stage=stage, **observed(folder))
    found = train(engine, 1, 2)
    engine.set_train_batch_size(2 * engine.train_batch_size())
    for name, rows in train(engine, 3, 5).items():
        found[name] += rows
    dist.barrier()
    count = engine.gradient_accumulation_steps()
    engine.gradprune.detach()
    return found | {"count": count, "series": series(folder)}


def own_disks(folder: str, **arguments: Any) -> dict[str, Any]:
    """As `resumes`, on hosts that share no disk."""
    folder = f"{folder}/disk_{dist.get_rank() // RANKS}"
    return zero_gradient_cases.resumes(folder, **arguments)


def foreign() -> str:
    """What attach says against an engine whose data-parallel group is an island."""
    engine = make_engine(Groups(RANKS), stage=0)
    engine.config["gradient_pruning"] = ISLANDS
    try:
        attach(engine)
    except UnsupportedError as exc:
        return str(exc)
    return "accepted"


def crowded() -> str:
    """What attach says where gradients of islands of several ranks are to leave early."""
    try:
        zero_gradient_cases.make(ISLANDS | {"overlap": "auto"}, stage=2)
    except UnsupportedError as exc:
        return str(exc)
    return "accepted"


def run_all(cases: dict[str, tuple[str, dict[str, Any]]], ranks: int = RANKS) -> dict[str, Any]:
    """Run cases one after the other; a failure ends the list, the ranks may be out of step.

    Args:
        cases: name -> (name of a function, its arguments).
        ranks: of an island. `dense` and `pruned` alone take another number.
    """
    start_deepspeed()
    ISLANDS["island"] = {"ranks": ranks}
    PRUNED.update(ISLANDS)  # of the other module's cases, too
    KINDS.update(STAGE_0)
    everywhere = vars(zero_gradient_cases) | globals()
    return run_cases(cases, everywhere.__getitem__)
