"""What one rank finds out about pruned gradients at ZeRO stages 1 and 2."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.errors import GradPruneError
from tests.helpers.ranks import run_cases
from tests.helpers.shard_bench import batch, start_deepspeed
from tests.helpers.zero_gradient_bench import (
    EXACT,
    KINDS,
    PRUNED,
    STEPS,
    Spare,
    crc,
    make,
    train,
)


def kind(name: str) -> dict[str, Any]:
    """Plain, dense and pruned; for exact kinds what a pruned step lost or gained."""
    options = KINDS[name]
    plain = train(make(None, **options), 1, STEPS)
    dense = make(PRUNED | {"warmup_steps": 99}, **options)
    answers: dict[str, Any] = {"plain": plain, "dense": train(dense, 1, STEPS)}
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


def without_rounds(stage: int) -> dict[str, Any]:
    """The micro-steps of a step reduced together: `coalesce_grad_reduction`, or `no_sync`."""
    engine = make(PRUNED, stage=stage)
    answers: dict[str, list[Any]] = {"crcs": [], "reports": [], "losses": []}
    for step in range(1, 5):
        losses = []
        if stage == 2:
            with engine.coalesce_grad_reduction():
                losses += [_backward(engine, step, micro_step) for micro_step in range(2)]
        else:
            with engine.no_sync():
                losses.append(_backward(engine, step, 0))
            engine.step()
            losses.append(_backward(engine, step, 1))
        if stage == 2:
            engine.step()  # of the first micro-step: none
        engine.step()
        report = engine.gradprune.report
        answers["crcs"].append(crc(engine))
        answers["losses"].append(sum(losses) / 2)
        answers["reports"].append((report.step, report.loss, report.wire_bytes))
    engine.gradprune.detach()
    return answers


def _backward(engine: Any, step: int, micro_step: int) -> float:
    loss = engine(batch(step, micro_step, dist.get_rank()))
    engine.backward(loss)
    return float(loss.detach())


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
    """By parameter, joined from its parts; what other ranks of the island owe is 0."""
    numels = {name: p.numel() for name, p in engine.module.named_parameters()}
    whole: dict[str, torch.Tensor] = {}
    for key, flat in engine.gradprune.pruning.residuals.state_dict().items():
        name, start = key.split("[")[0], sum(map(int, re.findall(r"\[(\d+):", key)))
        if name in numels:  # not padding
            owed = whole.setdefault(name, torch.zeros(numels[name]))
            owed[start : start + flat.numel()] = flat
    return whole


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


def attached_again() -> list[int]:
    """How many process groups there are after each of three attaches and detaches."""
    counts = []
    for _ in range(3):
        make(PRUNED, stage=0).gradprune.detach()
        counts.append(len(dist.distributed_c10d._world.pg_map))
    return counts


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
    start_deepspeed()
    return run_cases(cases, globals().__getitem__)
