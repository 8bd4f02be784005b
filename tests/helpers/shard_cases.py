"""What one rank of 2x1 or 2x2 islands finds out about its shards, for tests/deepspeed.

Longer than 300 lines: all cases that one start of ranks runs in a row.
"""

from __future__ import annotations

import collections
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.helpers.shard_bench import (
    WIDTH,
    Bench,
    Odd,
    alike,
    batch,
    ds_config,
    everywhere,
    make_engine,
    same,
    start_deepspeed,
    train,
    weights_of,
)

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
TWO = {"gradient_accumulation_steps": 2}
KINDS: dict[str, dict[str, Any]] = {
    "0-fp32": {"stage": 0},
    "0-bf16": {"stage": 0, "dtype": "bf16"} | TWO,
    "0-fp16": {"stage": 0, "dtype": "fp16", "split": True},
    "1-fp32": {"stage": 1} | TWO,
    "1-bf16": {"stage": 1, "dtype": "bf16"},
    "1-fp32-sums": {"stage": 1, "dtype": "bf16", "split": True} | FP32_SUMS,
    "2-fp32": {"stage": 2, "split": True},
    "2-fp32-sums": {"stage": 2, "dtype": "bf16"} | FP32_SUMS | TWO,
    "2-loose": {
        "stage": 2,
        "zero": {"contiguous_gradients": False, "round_robin_gradients": True},
        "split": True,
    },
    "2-autocast": {
        "stage": 2,
        "zero": {"parameter_alignment": True},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    },
    "2-offload": {"stage": 2, "dtype": "bf16", "zero": OFFLOAD} | TWO,
    "3-fp32": {"stage": 3, "split": True},
    "3-bf16": {"stage": 3, "dtype": "bf16"} | TWO,
    "3-fp16": {
        "stage": 3,
        "dtype": "fp16",
        "zero": {"stage3_param_persistence_threshold": 0, "sub_group_size": 600},
    },
    "3-offload": {
        "stage": 3,
        "dtype": "bf16",
        "zero": OFFLOAD | {"offload_param": {"device": "cpu"}},
        "split": True,
    },
}


def covers(bench: Bench) -> dict[str, Any]:
    """The island's pieces are all trained elements, each once; the rest is the rest."""
    shards = bench.shards
    mine = [(p.key, p.own.numel(), p.pruned) for p in shards.pieces()]
    island = [piece for pieces in everywhere(mine, bench.inner) for piece in pieces]
    seen: dict[str, list[int]] = collections.defaultdict(list)
    for (name, first), numel, _ in island:
        seen[name] += range(first, first + numel)
    named = dict(bench.engine.module.named_parameters())
    numels = {n: getattr(p, "ds_numel", p.numel()) for n, p in named.items() if p.requires_grad}
    wanted = {name: [*range(numel)] for name, numel in numels.items()}
    rest = shards.rest()
    return {
        "once": {name: sorted(elements) for name, elements in seen.items()} == wanted,
        "alike": len({str(m) for m in everywhere(mine, bench.groups.outer)}) == 1,
        "pruned": sorted({name for (name, _), _, pruned in island if pruned}),
        "flat": all(p.own.dtype == torch.float32 and p.own.dim() == 1 for p in shards.pieces()),
        "rest": (len(rest.sharded), len(rest.whole)),
        "share": sum(numel for _, numel, _ in mine) / sum(numels.values()),
        "has_masters": shards.has_masters,
    }


def parts(bench: Bench) -> dict[str, bool]:
    """Islands do not talk: one evaluates while the other does not, and they differ afterwards."""
    sizes: set[int] = set()
    names = [n for n in vars(dist) if n.startswith(("all_", "reduce", "broadcast", "barrier"))]
    originals = {name: getattr(dist, name) for name in names if callable(getattr(dist, name))}

    def spy(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = [a for a in (*args, kwargs.get("group")) if isinstance(a, dist.ProcessGroup)]
            sizes.add(dist.get_world_size(given[0] if given else None))
            return original(*args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(dist, name, spy(original))
    try:
        if bench.groups.island:
            bench.engine.eval()
            with torch.no_grad():
                bench.engine(batch(0, 0, 0))
            bench.engine.train()
        bench.alone(1, 3)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return {
        "apart": not alike(bench.weights(), bench.groups.outer),
        "alone": max(sizes, default=1) <= bench.groups.num_shards,
        "one": alike(bench.weights(), bench.inner),
    }


def publishes(bench: Bench) -> dict[str, Any]:
    """What is written into pieces is in the model of every rank, and is stepped on from there."""
    import deepspeed

    before = bench.weights()
    module = bench.engine.module
    with torch.no_grad():
        for piece in bench.shards.pieces():
            piece.own.add_(1.0)
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        bench.shards.publish()
        inside = {name: p.detach().clone() for name, p in module.named_parameters()}
    after = bench.weights()
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    errors = [float((after[n].float() - before[n].float() - 1).abs().max()) for n in trained]
    written = bench.masters()
    bench.alone(4, 4)
    moves = [float((own - written[key]).abs().max()) for key, own in bench.masters().items()]
    return {
        "error": max(errors),
        "inside": same(inside, after),
        "frozen": torch.equal(after["frozen.weight"], before["frozen.weight"]),
        "one": alike(after, bench.inner),
        "stepped": 0 < max(moves) < 0.1,
    }


def resumes(bench: Bench, other: Bench) -> dict[str, bool]:
    """Weights and state of one engine, put into another, go on as if nothing had happened."""
    state, own = bench.shards.state_dict(), bench.masters()
    other.alone(7, 8)
    places = _addresses(other)
    other.shards.load_state_dict(state)
    with torch.no_grad():
        for piece in other.shards.every_piece():
            piece.own.copy_(own[piece.key])
    other.shards.publish()
    in_place = _addresses(other) == places
    bench.alone(5, 6)
    other.alone(5, 6)
    return {
        "goes_on": same(bench.masters(), other.masters()),
        "published": same(bench.weights(), other.weights()),
        "in_place": in_place,
        "plain": _is_plain(state),
    }


def _addresses(bench: Bench) -> list[int]:
    moments = bench.shards.state_dict()["moments"]
    return [v.data_ptr() for m in moments for v in m.values() if torch.is_tensor(v) and v.dim()]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(inner) for inner in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(inner) for inner in value)
    return value is None or torch.is_tensor(value) or type(value) in (bool, int, float, str)


def warms_up(bench: Bench, plain: Any = None) -> dict[str, Any]:
    """A dense warm-up, beside plain DeepSpeed on all ranks if there is such an engine.

    Returns:
        off: how far the weights are from those of `plain`, as a part of the way they have gone.
    """
    start = bench.weights()
    with bench.averaging():
        train(bench.engine, 1, 3)
    mine = bench.weights()
    answers: dict[str, Any] = {
        "alike": alike(mine, bench.groups.everyone),
        "fault": bench.shards.warmup_fault,
    }
    if plain is not None:
        train(plain, 1, 3)
        wanted = weights_of(plain)
        way = sum(float((w.float() - start[n].float()).abs().sum()) for n, w in wanted.items())
        off = sum(float((w.float() - mine[n].float()).abs().sum()) for n, w in wanted.items())
        answers["off"] = off / way
    return answers


def files(bench: Bench, fresh: Bench, folder: str) -> dict[str, Any]:
    """Island 0 writes DeepSpeed's files, and every island reads them."""
    bench.take_first_islands()
    with bench.groups.writing(bench.engine, bench.groups.island == 0):
        bench.engine.save_checkpoint(folder, tag="t")
    with fresh.groups.reading(fresh.engine):
        fresh.engine.load_checkpoint(folder, tag="t")
    tag = Path(folder) / "t"
    return {
        "files": sorted(path.name for path in tag.iterdir()),
        "weights": same(bench.weights(), fresh.weights()),
        "masters": same(bench.masters(), fresh.masters()),
        "flag": bench.engine.save_non_zero_checkpoint,
    }


FILES = ("0-bf16", "1-fp32-sums", "2-fp32", "3-bf16")
"""Kinds whose checkpoints are looked at: one per stage."""


def run_pairs(folder: str) -> dict[str, Any]:
    """Islands of two ranks: every check on every kind of engine.

    Returns:
        kind -> check -> what it found. A failed check leaves its traceback and ends the run.
    """
    start_deepspeed()
    from ds_gradprune.deepspeed.groups import Groups

    groups = Groups(2)

    def checks(kind: str) -> Iterator[tuple[str, Any]]:
        options = KINDS[kind]
        bench = Bench(groups, **options)
        yield "covers", covers(bench)
        yield "parts", parts(bench)
        yield "publishes", publishes(bench)
        yield "resumes", resumes(bench, Bench(groups, **options))
        if kind in FILES:
            yield "files", files(bench, Bench(groups, **options), f"{folder}/{kind}")
        yield "warms_up", warms_up(Bench(groups, **options))

    return _collect(checks)


def run_singles() -> dict[str, Any]:
    """Islands of one rank, whose warm-up adds in the order of plain DeepSpeed."""
    start_deepspeed()
    from ds_gradprune.deepspeed.groups import Groups

    groups = Groups(1)

    def checks(kind: str) -> Iterator[tuple[str, Any]]:
        options = KINDS[kind] | {"gradient_clipping": 0.0}
        bench = Bench(groups, **options)
        yield "covers", covers(bench)
        yield "warms_up", warms_up(bench, make_engine(None, **options))
        yield "parts", parts(bench)
        yield "publishes", publishes(bench)

    return _collect(checks)


def _collect(checks: Callable[[str], Iterator[tuple[str, Any]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in KINDS:
        found[kind] = {}
        try:
            found[kind].update(checks(kind))
        except Exception:
            found[kind]["fault"] = traceback.format_exc()
            break
    return found


# ---- single cases -----------------------------------------------------------------------------


def run_odd() -> dict[str, Any]:
    """Everything else that needs real islands."""
    start_deepspeed()
    from ds_gradprune.deepspeed.groups import Groups
    from ds_gradprune.deepspeed.groups import groups as theirs

    groups = Groups(2)
    return {
        "place": (groups.island, groups.num_islands, groups.shard, groups.num_shards),
        "outer": dist.get_process_group_ranks(groups.outer),
        "inner": dist.get_process_group_ranks(groups.inner),
        "clean": theirs.mpu is None,
        "orders": _orders(groups),
        "frozen": [_frozen(Bench(groups, stage=stage)) for stage in (0, 2)],
        "steps": [_overflows(Bench(groups, stage=s, dtype="fp16")) for s in (0, 2, 3)],
    } | _built_divided(groups)


def _orders(groups: Any) -> str:
    """Ranks of one island run modules in different orders."""
    from ds_gradprune.deepspeed.zero3_setup import _compare
    from ds_gradprune.errors import RankMismatchError

    cpu = torch.device("cpu")
    _compare([7, groups.island], groups, cpu)
    try:
        _compare([7, groups.shard], groups, cpu)
    except RankMismatchError as exc:
        return str(exc)
    return "accepted"


def _frozen(bench: Bench) -> tuple[list[str], bool]:
    """Which pieces leave when a layer is frozen, and whether they are back when it is thawed."""
    names = {piece.key: piece.name for piece in bench.shards.pieces()}
    weight = bench.engine.module.up.weight
    weight.requires_grad_(False)
    fewer = {piece.key for piece in bench.shards.pieces()}
    weight.requires_grad_(True)
    back = [piece.key for piece in bench.shards.pieces()] == [*names]
    return sorted({name for key, name in names.items() if key not in fewer}), back


def _overflows(bench: Bench) -> bool:
    """Island 1's loss is infinite: does this island step?"""
    with bench.groups.in_force():
        loss = bench.engine(batch(1, 0, dist.get_rank()))
        bench.engine.backward(loss * float("inf") if bench.groups.island else loss)
        bench.engine.step()
    applied: bool = bench.engine.was_step_applied()
    return applied


def _built_divided(groups: Any) -> dict[str, Any]:
    """Models built under zero.Init, with an adapter added later, beside one built whole."""
    import deepspeed

    from ds_gradprune.deepspeed.zero3_setup import repartition
    from ds_gradprune.errors import UnsupportedError

    benches = []
    for way in ("all ranks", "the island", "whole"):
        group = groups.get_data_parallel_group() if way == "the island" else None
        with deepspeed.zero.Init(
            data_parallel_group=group, config_dict_or_path=ds_config(3), enabled=way != "whole"
        ):
            model = Odd()
        model.adapter = nn.Linear(5, WIDTH)
        torch.manual_seed(1)
        for parameter in model.parameters():
            value = torch.randn(getattr(parameter, "ds_shape", parameter.shape)) * 0.1
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        repartition(model, groups)
        repartition(model, groups)  # twice is fine
        benches.append(Bench(groups, stage=3, model=model))
    once = [covers(bench)["once"] for bench in benches]
    for bench in benches:
        bench.alone(1, 2)
    answers: dict[str, Any] = {
        "divided": (once, [same(bench.masters(), benches[2].masters()) for bench in benches])
    }
    trio = dist.new_group([0, 1, 2])
    if dist.get_rank() < 3:
        with deepspeed.zero.Init(data_parallel_group=trio):
            odd = nn.Linear(4, 4)
        try:
            repartition(odd, groups)
        except UnsupportedError as exc:
            answers["refused"] = str(exc)
    return answers
