"""What people add to a training, with islands of two ranks at every ZeRO stage.

Longer than 300 lines: all features that one start of ranks tries in a row.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.shard_bench import (
    Odd,
    batch,
    ds_config,
    start_deepspeed,
    weights_of,
)
from tests.helpers.zero_bench import (
    DENSE,
    PRUNED,
    SGD,
    everywhere,
    farthest,
    make,
    train,
    way,
)
from tests.helpers.zero_cases import collect, crc_of, shares
from tests.helpers.zero_models import Few, Lion, rich, two_groups

STAGES = (0, 1, 2, 3)


EVERYTHING: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.2,
    "gradient_predivide_factor": 2.0,
}
PREDIVIDES = {2: {"reduce_scatter": False}, 3: {"reduce_scatter": False}}
"""Stage -> what DeepSpeed wants beside a predivide factor."""


def everything(stage: int) -> dict[str, Any]:
    """Accumulation, clipping, predivide, groups, tied, frozen, unused, checkpointed: as plain."""
    more = EVERYTHING | {"stage": stage, "groups": two_groups, "zero": PREDIVIDES.get(stage, {})}
    options = SGD | more
    folder = f"{os.environ['DS_TEST_STORE']}_csv_{stage}"
    more = more | observed(folder)
    plain, largest = way(make(None, model=rich(), **options), 3)
    warmed, _ = way(make(PRUNED | {"warmup_steps": 99}, model=rich(), **options), 3)
    weight = max(float(w.abs().max()) for w in plain.values())
    found = shares(2, more, steps=6, model=rich)
    dist.barrier()
    return {
        "off": farthest(plain, warmed),
        "weight": weight,
        "step": largest,
        "shares": found,
        "series": series(folder),
    }


def observed(folder: str) -> dict[str, Any]:
    """DeepSpeed's ways to look at a training: a monitor, its profiler, its breakdown."""
    return {
        "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "job"},
        "flops_profiler": {"enabled": True, "profile_step": 3, "output_file": f"{folder}.txt"},
        "wall_clock_breakdown": True,
    }


def series(folder: str) -> list[str]:
    """Our series that a monitor wrote; the profiler has written, too."""
    assert "params" in Path(f"{folder}.txt").read_text()
    names = [path.stem.removeprefix("Train_Samples_") for path in Path(folder).rglob("*.csv")]
    return sorted(name for name in names if name.startswith("gradient_pruning"))


def adapters(stage: int) -> dict[str, Any]:
    """Only adapters are trained: only they are exchanged and held."""
    model = rich(trains_all=False)
    engine = make(PRUNED, model=model, stage=stage)
    handle = engine.gradprune
    before = weights_of(engine)
    train(engine, 1, 5)
    after = weights_of(engine)
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    held = everywhere(handle.held_bytes)
    return {
        "moved": moved,
        "held": held[0] + held[1],
        "dense": handle.report.dense_bytes,
        "sent": handle.report.wire_bytes,
        "crcs": everywhere(handle.parameters_crc()),
    }


def clients(stage: int) -> dict[str, Any]:
    """A client's optimizer and schedule."""
    options: dict[str, Any] = {
        "stage": stage,
        "client": Lion,
        "schedule": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1.0 / (1 + step)
        ),
        "zero_allow_untested_optimizer": True,
    }
    return shares(2, options, steps=6)


def muon(stage: int) -> dict[str, Any]:
    """DeepSpeed's Muon for the matrices, without compiling it."""
    torch.compiler.set_stance("force_eager")
    parameters = {"lr": 2e-3, "muon_lr": 0.02, "adam_lr": 2e-3}
    options = {"stage": stage, "optimizer": {"type": "Muon", "params": parameters}}
    options |= {"zero": {"reduce_scatter": False}} if stage == 3 else {}
    return shares(2, options, steps=6, warmup="unpruned" if stage == 2 else "dense")


def _two(engine: Any, step: int) -> None:
    """Two micro-batches reduced together."""
    is_divided = engine.zero_optimization_stage() > 1
    with engine.coalesce_grad_reduction() if is_divided else engine.no_sync():
        engine.backward(engine(batch(step, 0, dist.get_rank())))
        if is_divided:
            engine.backward(engine(batch(step, 1, dist.get_rank())))
    if not is_divided:
        engine.backward(engine(batch(step, 1, dist.get_rank())))
    engine.step()


def _direct(engine: Any, step: int) -> None:
    """`loss.backward()` in place of `engine.backward(loss)`."""
    engine.scale(engine(batch(step, 0, dist.get_rank()))).backward()
    engine.step()


def in_another_way(one_step: Callable[[Any, int], None], stage: int) -> dict[str, Any]:
    """A step that is no forward, `backward`, `step`: as plain in the warm-up, then apart."""

    def steps(engine: Any, first: int, last: int) -> dict[str, torch.Tensor]:
        for step in range(first, last + 1):
            one_step(engine, step)
        return weights_of(engine)

    options = SGD | {"stage": stage}
    plain = steps(make(None, **options), 1, 3)
    engine = make(PRUNED | {"warmup_steps": 3}, **options)
    warmed = steps(engine, 1, 3)
    steps(engine, 4, 5)
    return {
        "off": farthest(plain, warmed),
        "crcs": everywhere(engine.gradprune.parameters_crc()),
        "steps": engine.gradprune.loop.step,
    }


def resized_batch(stage: int) -> dict[str, Any]:
    """`set_train_batch_size` in mid-run."""
    engine = make(PRUNED, stage=stage)
    train(engine, 1, 3)
    engine.set_train_batch_size(3 * engine.train_batch_size())
    losses = train(engine, 4, 5)
    reported = engine.gradprune.report.loss
    return {
        "count": engine.gradient_accumulation_steps(),
        "crcs": everywhere(engine.gradprune.parameters_crc()),
        "loss": abs(reported - sum(everywhere(losses[-1])) / 4),
    }


def overflows(stage: int) -> dict[str, Any]:
    """fp16: gradients of one island are infinite, in the warm-up and after it."""
    engine = make(PRUNED, stage=stage, dtype="fp16")
    handle = engine.gradprune
    train(engine, 1, 2, spoil=(2, 1))
    answers = {"warm": everywhere((engine.skipped_steps, handle.parameters_crc()))}
    train(engine, 3, 5, spoil=(4, 1))
    scale = engine._get_optimizer_loss_scale()
    answers["apart"] = everywhere((engine.skipped_steps, handle.parameters_crc(), scale))
    answers["steps"] = everywhere((handle.loop.step, engine.global_steps))
    return answers


def few(stage: int) -> dict[str, Any]:
    """One element is trained."""
    engine = make(DENSE if stage == 2 else PRUNED, model=Few(), stage=stage)
    train(engine, 1, 5)
    with engine.gradprune.shared_weights():
        return {"crcs": everywhere(float(engine.module.gain))}


def seeds(stage: int) -> dict[str, Any]:
    """Every rank draws other weights: those of rank 0 hold, fp32 and rounded."""
    engine = make(PRUNED, seed=10 + dist.get_rank(), stage=stage, dtype="bf16")
    handle = engine.gradprune
    return {
        "weights": everywhere(crc_of(weights_of(engine))),
        "masters": everywhere(handle.parameters_crc()),
    }


def measured(stage: int) -> dict[str, Any]:
    """Real clocks, which every rank has of its own, and a budget: one decision for all."""
    link = {"schedule": [{"step": 0, "rate_mbit": 20}, {"step": 12, "rate_mbit": 4}]}
    density = {"initial": 0.1, "min": 0.002, "max": 0.25}
    block = PRUNED | {"step_time_budget_s": 0.02, "density": density, "throttle": link}
    engine = make(block, stage=stage, is_virtual=False)
    decisions: list[float] = []
    train(engine, 1, 20, lambda _: decisions.append(engine.gradprune.loop.decision.density))
    return {"decisions": everywhere(decisions)}


def divided(stage: int) -> dict[str, Any]:
    """A model that was built under zero.Init, divided among all ranks."""
    import deepspeed

    def build() -> Any:
        with deepspeed.zero.Init(config_dict_or_path=ds_config(stage)):
            return Odd()

    return shares(2, {"stage": stage}, steps=6, model=build)


def reloads(stage: int) -> dict[str, Any]:
    """Only the weights of a checkpoint are wanted."""
    folder = os.environ["DS_TEST_STORE"] + f"_{stage}"
    engine = make(PRUNED, stage=stage, dtype="bf16")
    handle = engine.gradprune
    train(engine, 1, 5)
    engine.save_checkpoint(folder, tag="t")
    with handle.shared_weights():
        before = weights_of(engine)
    saved = crc_of(before)
    answers = {}
    for name in ("load_optimizer_states", "load_module_only"):
        engine = make(PRUNED, stage=stage, dtype="bf16", seed=4)
        for when in ("fresh", "trained"):
            engine.load_checkpoint(folder, **{name: name == "load_module_only"})
            found = {"same": everywhere(crc_of(weights_of(engine)) == saved)}
            found["step"] = [engine.gradprune.loop.step]
            train(engine, 6, 6)
            found["near"] = everywhere(_distance(weights_of(engine), before) < 0.1)
            train(engine, 7, 9)
            found["crcs"] = everywhere(engine.gradprune.parameters_crc())
            answers[f"{name}, {when}"] = found
    return answers


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """How far they are apart, where two random models are 1 apart."""
    apart = sum(float((one[n] - other[n]).float().square().sum()) for n in one)
    size = sum(float(other[n].float().square().sum()) for n in other)
    return (apart / size) ** 0.5


def compiled(stage: int) -> dict[str, Any]:
    """`engine.compile()`."""
    engine = make(PRUNED, stage=stage)
    engine.compile(backend="eager")
    train(engine, 1, 5)
    handle, tokens = engine.gradprune, batch(9, 0, 0)
    with handle.shared_weights(), torch.no_grad():
        shared = float(engine.module(tokens))
    engine.eval()
    with torch.no_grad():
        evaluated = float(engine(tokens))
    engine.train()
    own = float(engine(tokens).detach())
    return {
        "view": (evaluated == shared, own != shared),
        "crcs": everywhere(handle.parameters_crc()),
    }


def between(stage: int) -> dict[str, Any]:
    """An evaluation between a forward and its backward changes nothing."""
    found = []
    for dtype in ("fp32", "bf16") if stage == 0 else ("bf16",):
        ends = []
        for evaluates in (False, True):
            engine = make(PRUNED, stage=stage, dtype=dtype)
            train(engine, 1, 4)
            loss = engine(batch(5, 0, dist.get_rank()))
            if evaluates:
                engine.eval()
                with torch.no_grad():
                    engine(batch(9, 0, 0))
                engine.train()
            engine.backward(loss)
            engine.step()
            ends.append(crc_of(weights_of(engine)))
        found.append(ends[0] == ends[1])
    return {"same": found}


TRIED: dict[str, Any] = {
    "warmup": "auto",
    "warmup_steps": 60,
    "throttle": {"schedule": [{"step": 0, "rate_mbit": 0.05}]},
}
"""A link so slow that nothing is sent dense: exchanges come after steps 1, 3 and 7."""

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unpruned": ({"stage": 2}, {"warmup": "unpruned"}),
    "every-4": ({"stage": 3}, {"sync_every": 4, "residual_decay": 0.9}),
    "every-4-used": ({"stage": 1}, {"sync_every": 4, "residual": "used"}),
    "reset": ({"stage": 0, "dtype": "bf16"}, {"residual": "reset"}),
    "hidden": ({"stage": 2, "dtype": "bf16"}, {"sync_every": 4, "overlap": "auto"}),
    "owners": ({"stage": 3}, {"exchange": "owner_reduce"}),
    "owners-0": ({"stage": 0, "dtype": "bf16"}, {"exchange": "owner_reduce", "value_bits": 2}),
    "on-cpu": ({"stage": 1, "dtype": "bf16"}, {"shared_device": "cpu", "value_bits": 16}),
    "momentum": ({"stage": 0}, {"slow_momentum": 1.0}),
    "loose": (
        {
            "stage": 2,
            "zero": {
                "contiguous_gradients": False,
                "round_robin_gradients": True,
                "overlap_comm": True,
                "reduce_scatter": False,
                "reduce_bucket_size": 1000,
                "allgather_bucket_size": 1000,
            },
        },
        {},
    ),
    "autocast-0": ({"stage": 0, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, {}),
    "autocast-3": ({"stage": 3, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, {}),
    "groups-3": (
        {"stage": 3, "zero": {"sub_group_size": 600, "stage3_param_persistence_threshold": 0}},
        {},
    ),
    **{f"slow-{stage}": ({"stage": stage}, TRIED) for stage in STAGES},
}


def run_features(features: list[str] | None = None) -> dict[str, Any]:
    """Islands of two ranks: feature -> what was found at every stage."""
    start_deepspeed()

    def checks(feature: str) -> Iterator[tuple[str, Any]]:
        if feature in WAYS:
            options, block = WAYS[feature]
            yield "shares", shares(2, options, steps=9, **block)
            return
        work, stages = FEATURES[feature]
        for stage in stages:
            yield str(stage), work(stage)

    return collect(checks, features or [*FEATURES, *WAYS])


FEATURES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "everything": (everything, STAGES),
    "adapters": (adapters, STAGES),
    "clients": (clients, STAGES),
    "muon": (muon, (0, 2, 3)),
    "no_sync": (functools.partial(in_another_way, _two), STAGES),
    "direct": (functools.partial(in_another_way, _direct), (1, 2, 3)),
    "batch": (resized_batch, (0, 2, 3)),
    "overflow": (overflows, STAGES),
    "few": (few, STAGES),
    "seeds": (seeds, STAGES),
    "measured": (measured, (0, 2)),
    "divided": (divided, (3,)),
    "reloads": (reloads, STAGES),
    "compiled": (compiled, STAGES),
    "between": (between, STAGES),
}
