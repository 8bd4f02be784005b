"""What one rank finds out about pruned gradients at ZeRO stages 1 and 2."""

from __future__ import annotations

import copy
import logging
import re
import traceback
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_gradprune.errors import GradPruneError
from tests.helpers.shard_bench import (
    MIN_NUMEL,
    WIDTH,
    Odd,
    batch,
    ds_config,
    start_deepspeed,
)

PRUNED: dict[str, Any] = {
    "prune": "gradient",
    "warmup_steps": 2,
    "ramp_steps": 0,
    "window_size": 4,
    "min_numel": MIN_NUMEL,
    "timeout_s": 60,
    "verify_every_steps": 1,
    "density": {"initial": 0.02, "min": 0.02, "max": 0.02},
}
BUCKET = 700
"""Elements of a reduction: several in every round, and the embedding is larger than one."""
STEPS = 5
SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

KINDS: dict[str, dict[str, Any]] = {
    "1-fp32": {"stage": 1},
    "1-overlap": {"stage": 1, "zero": {"overlap_comm": True}},
    "1-whole": {
        "stage": 1,
        "zero": {"reduce_scatter": False},
        "gradient_predivide_factor": 4.0,
        "gradient_clipping": 0.5,
    },
    "1-loose": {"stage": 1, "zero": {"contiguous_gradients": False}},
    "1-bf16": {"stage": 1, "dtype": "bf16"},
    "1-bf16-sums": {"stage": 1, "dtype": "bf16"} | SUMS,
    "1-fp16": {"stage": 1, "dtype": "fp16"},
    "1-unmanaged": {"stage": 1, "managed_gradient_accumulation": False},
    "2-fp32": {"stage": 2},
    "2-whole": {"stage": 2, "zero": {"reduce_scatter": False}},
    "2-overlap": {"stage": 2, "zero": {"overlap_comm": True}, "gradient_clipping": 0.5},
    "2-single": {"stage": 2, "zero": {"use_multi_rank_bucket_allreduce": False}},
    "2-loose": {"stage": 2, "zero": {"contiguous_gradients": False}},
    "2-robin": {"stage": 2, "zero": {"round_robin_gradients": True}},
    "2-unmanaged": {"stage": 2, "managed_gradient_accumulation": False},
    "2-bf16": {"stage": 2, "dtype": "bf16", "zero": {"overlap_comm": True}},
    "2-bf16-sums": {"stage": 2, "dtype": "bf16"} | SUMS,
    "2-bf16-single": {
        "stage": 2,
        "dtype": "bf16",
        "zero": {"use_multi_rank_bucket_allreduce": False},
    }
    | SUMS,
    "2-fp16": {"stage": 2, "dtype": "fp16"},
    "2-offload": {"stage": 2, "dtype": "bf16", "zero": OFFLOAD},
}
EXACT = (
    *("1-fp32", "1-overlap", "1-loose", "1-bf16-sums", "2-fp32", "2-whole", "2-overlap"),
    *("2-single", "2-robin", "2-bf16-sums"),
)
"""Kinds whose gradients are not rounded on the way: the books must balance."""


class Spare(Odd):
    """With a layer that gets no gradient, unless it is asked to stand in for another."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(33, WIDTH)

    def forward(self, tokens: torch.Tensor, use_spare: bool = False) -> torch.Tensor:
        down = self.down
        if use_spare:
            self.down = self.spare
        try:
            return super().forward(tokens)
        finally:
            self.down = down


def make(block: dict[str, Any] | None, seed: int = 0, **options: Any) -> Any:
    """An engine around a fresh `Spare` with two parameter groups; None: plain DeepSpeed's."""
    import deepspeed

    from ds_gradprune.deepspeed.attach import Clock, attach
    from tests.helpers.ranks import VirtualClock

    torch.manual_seed(seed)
    model = Spare()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    flat = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": flat, "weight_decay": 0.0}]
    options = {"gradient_accumulation_steps": 2} | options
    options["zero"] = {"reduce_bucket_size": BUCKET} | options.get("zero", {})
    config = ds_config(**options)
    if block is not None:
        config["gradient_pruning"] = block
    engine = deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]
    if block is not None:
        clock = VirtualClock()
        attach(engine, clock=Clock(clock.now_s, clock.sleep))
    return engine


def train(
    engine: Any, first: int, last: int, spoil: tuple[int, int] | None = None
) -> dict[str, list[Any]]:
    """Steps first .. last; `spoil` is a step and a rank whose last micro-step is infinite."""
    from ds_gradprune.deepspeed.monitor import as_json

    trace: dict[str, list[Any]] = {"crcs": [], "losses": [], "reports": []}
    for step in range(first, last + 1):
        losses, count = [], engine.gradient_accumulation_steps()
        for micro_step in range(count):
            loss = engine(batch(step, micro_step, dist.get_rank()))
            is_spoilt = spoil == (step, dist.get_rank()) and micro_step == count - 1
            engine.backward(loss * float("inf") if is_spoilt else loss)
            losses.append(float(loss.detach()))
            if engine.managed_gradient_accumulation() or micro_step == count - 1:
                engine.step()
        trace["losses"].append(sum(losses) / count)
        trace["crcs"].append(crc(engine))
        if getattr(engine, "gradprune", None) is not None:
            trace["reports"].append(as_json(engine.gradprune.report))
    return trace


def crc(engine: Any) -> int:
    from ds_gradprune.deepspeed.idle import module_crc

    return module_crc(engine.module)


def kind(name: str) -> dict[str, Any]:
    """Plain, dense and pruned; for exact kinds what a pruned step lost or gained."""
    options = KINDS[name]
    plain = train(make(None, **options), 1, STEPS)
    dense = make(PRUNED | {"warmup_steps": 99}, **options)
    answers = {"plain": plain, "dense": train(dense, 1, STEPS)}
    dense.gradprune.detach()
    engine = make(PRUNED, **options)
    answers["pruned"] = train(engine, 1, STEPS)
    if name in EXACT:
        answers["lost"] = balance(engine, STEPS + 1)
    answers["residual"] = engine.gradprune.pruning.residuals.norm()
    engine.gradprune.detach()
    return answers


def owners() -> dict[str, Any]:
    """The exchange by owners, in each of two rounds of a step."""
    engine = make(PRUNED | {"exchange": "owner_reduce"}, stage=2)
    answers = train(engine, 1, 6)
    engine.gradprune.detach()
    return answers


def balance(engine: Any, step: int) -> dict[str, float]:
    """By parameter, of one step: |averaged - (gradients + residuals before - after) / ranks|."""
    world = dist.get_world_size()
    raw = local_gradients(engine, step)
    before = whole_residuals(engine)
    seen: dict[str, torch.Tensor] = {}
    original = engine._take_model_step

    def look(*args: Any, **kwargs: Any) -> Any:
        seen.update(averaged(engine))
        return original(*args, **kwargs)

    engine._take_model_step = look
    train(engine, step, step)
    del engine._take_model_step
    after = whole_residuals(engine)
    # With reduce_scatter DeepSpeed divides before we see a gradient, and without afterwards.
    optimizer = engine.optimizer
    is_zero = hasattr(optimizer, "ipg_buckets")
    divided = is_zero and (optimizer.reduce_scatter or not optimizer.contiguous_gradients)
    factor = 1.0 if divided else 1.0 / world
    lost = {}
    for name, result in seen.items():
        zero = torch.zeros_like(result)
        owed = before.get(name, zero) - after.get(name, zero)
        expected = raw.get(name, zero) / world + owed * factor
        dist.all_reduce(expected)
        lost[name] = float((result - expected).abs().max())
    lost["largest"] = max(float(result.abs().max()) for result in seen.values())
    return lost


def local_gradients(engine: Any, step: int) -> dict[str, torch.Tensor]:
    """This rank's own gradients of a step, by an undisturbed copy of the model."""
    model, count = Spare().to(engine.module.up.weight.dtype), engine.gradient_accumulation_steps()
    model.load_state_dict(copy.deepcopy(engine.module.state_dict()))
    found: dict[str, torch.Tensor] = {}
    for micro_step in range(count):
        model.zero_grad()
        (model(batch(step, micro_step, dist.get_rank())) / count).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found.setdefault(name, torch.zeros(parameter.numel())).add_(parameter.grad.view(-1))
    return found


def whole_residuals(engine: Any) -> dict[str, torch.Tensor]:
    """By parameter, joined from its parts."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for key, flat in engine.gradprune.pruning.residuals.state_dict().items():
        match = re.fullmatch(r"(.*)\[(\d+):\d+\]", key)
        name, start = (key, 0) if match is None else (match[1], int(match[2]))
        parts.setdefault(name, []).append((start, flat))
    return {
        name: torch.cat([flat for _, flat in sorted(found, key=lambda part: part[0])])
        for name, found in parts.items()
    }


def averaged(engine: Any) -> dict[str, torch.Tensor]:
    """What the partitions of all ranks hold, by parameter. Collective."""
    optimizer, found = engine.optimizer, {}
    if hasattr(optimizer, "fp32_groups_gradients"):  # every rank has all of them
        groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
        pairs = [pair for group in groups for pair in zip(*group, strict=True)]
        return {optimizer.param_names[p]: grad.view(-1).clone() for p, grad in pairs}
    for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
        mine = torch.cat([g.reshape(-1) for g in optimizer.averaged_gradients[group]])
        rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, mine)
        flat = torch.cat(rows)
        starts = optimizer.round_robin_bit16_offsets[group]
        for parameter, start in zip(parameters, starts, strict=True):
            name = optimizer.param_names[parameter]
            found[name] = flat[start : start + parameter.numel()].clone()
    return found


def resumes(folder: str, name: str, at: int, last: int) -> dict[str, Any]:
    """An unbroken run, and one that goes on from its checkpoint with other weights before."""
    engine = make(PRUNED, **KINDS[name])
    train(engine, 1, at)
    engine.save_checkpoint(folder, tag=name)
    unbroken = train(engine, at + 1, last)
    engine.gradprune.detach()
    other = make(PRUNED, seed=9, **KINDS[name])
    other.load_checkpoint(folder, tag=name)
    resumed = train(other, at + 1, last)
    other.gradprune.detach()
    return {"unbroken": unbroken, "resumed": resumed}


def overflow(name: str) -> dict[str, Any]:
    """Rank 1's gradients are infinite in the last micro-step of step 4."""
    engine = make(PRUNED, **KINDS[name])
    train(engine, 1, 3)
    store = engine.gradprune.pruning.residuals
    before = (crc(engine), {k: v.clone() for k, v in store.state_dict().items()})
    trace = train(engine, 4, 4, spoil=(4, 1))
    after = store.state_dict()
    same = before[1].keys() == after.keys() and all(
        torch.equal(before[1][k], after[k]) for k in after
    )
    answers = {
        "skipped": engine.skipped_steps,
        "nonfinite": trace["reports"][-1]["nonfinite"],
        "weights_same": crc(engine) == before[0],
        "residual_same": same and bool(after),
        "crcs": train(engine, 5, 6)["crcs"],
    }
    engine.gradprune.detach()
    return answers


def warned(**options: Any) -> list[str]:
    """What attach says."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ds_gradprune")
    logger.addHandler(handler)
    make(PRUNED, **options).gradprune.detach()
    logger.removeHandler(handler)
    return messages


def detach_leaves_nothing() -> list[str]:
    """Names that are left on the engine and its optimizer."""
    from deepspeed.comm import comm

    backend = comm.cdb
    engine = make(None, stage=2)
    before = {id(o): set(o.__dict__) for o in (engine, engine.optimizer)}
    import ds_gradprune

    engine.config["gradient_pruning"] = PRUNED
    ds_gradprune.attach(engine)
    train(engine, 1, 3)
    ds_gradprune.detach(engine)
    methods = {"step", "backward", "reduce_ipg_grads", "allreduce_bucket"}
    methods |= {"gradient_reduction_w_predivide", "overlapping_partition_gradients_reduce_epilogue"}
    left = [n for o in (engine, engine.optimizer) for n in methods & set(o.__dict__)]
    left += [] if comm.cdb is backend else ["cdb"]
    train(engine, 4, 5)
    return left + [n for n in before[id(engine)] if n not in engine.__dict__]


def refused(**options: Any) -> str:
    """What attach says against an engine."""
    try:
        make(PRUNED, **options)
    except GradPruneError as exc:
        return str(exc)
    return "accepted"


def differing(density: float) -> str:
    """Rank 1 trains another layer of the same shape in step 4."""
    level = {"initial": density, "min": density, "max": density}
    engine = make(PRUNED | {"density": level}, stage=2, gradient_accumulation_steps=1)
    train(engine, 1, 3)
    rank = dist.get_rank()
    message = "not noticed"
    try:
        engine.backward(engine(batch(4, 0, rank), use_spare=bool(rank)))
        engine.step()
    except GradPruneError as exc:
        message = str(exc)
    engine.gradprune.detach()
    return message


def run_all(cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Run cases one after the other; a failure ends the list, the ranks may be out of step."""
    results: dict[str, Any] = {}
    start_deepspeed()
    for name, (function, arguments) in cases.items():
        try:
            results[name] = globals()[function](**arguments)
        except Exception:
            results[name] = traceback.format_exc()
            break
    return results
