"""Engines of islands, made as users make them, at any ZeRO stage; beside them plain DeepSpeed's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.helpers.shard_bench import MIN_NUMEL, Odd, batch, ds_config, weights_of

SGD_LR = 0.02
SGD: dict[str, Any] = {
    "optimizer": {"type": "SGD", "params": {"lr": SGD_LR}},
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
}
PRUNED: dict[str, Any] = {
    "prune": "update",
    "warmup": "dense",
    "warmup_steps": 2,
    "ramp_steps": 0,
    "window_size": 4,
    "min_numel": MIN_NUMEL,
    "timeout_s": 60,
    "verify_every_steps": 1,
    "density": {"initial": 0.01, "min": 0.01, "max": 0.01},
}
DENSE: dict[str, Any] = PRUNED | {
    "warmup_steps": 0,
    "density": {"initial": 1.0, "min": 1.0, "max": 1.0},
    "value_bits": 32,
    "update_scale": 1.0,
}

MOVES = ("all", "_all", "reduce", "_reduce", "broadcast", "gather", "scatter", "send", "recv")
"""How the methods of a process group begin that move tensors."""


def make(
    block: dict[str, Any] | None,
    *,
    ranks: int = 2,
    model: nn.Module | None = None,
    groups: Callable[[nn.Module], Any] | None = None,
    client: Callable[[Any], Any] | None = None,
    schedule: Callable[[Any], Any] | None = None,
    seed: int = 0,
    is_virtual: bool = True,
    stage: int = 0,
    **options: Any,
) -> Any:
    """An engine.

    Args:
        block: ours; None: plain DeepSpeed over all ranks.
        ranks: of an island.
        model: what is trained; None: a fresh `Odd`, the same on all ranks.
        groups: parameter groups of the model; None: one.
        client: makes a client optimizer of the groups.
        schedule: makes a client schedule of the optimizer.
        seed: of the weights.
        is_virtual: the clock is one of steps, the same on all ranks.
        stage: of ZeRO.
        options: see `ds_config`.
    """
    import deepspeed

    from ds_gradprune.deepspeed.attach import Clock, attach
    from ds_gradprune.deepspeed.initialize import create
    from tests.helpers.ranks import VirtualClock

    torch.manual_seed(seed)
    model = Odd() if model is None else model
    parameters = list(model.parameters()) if groups is None else groups(model)
    config = ds_config(stage, **options)
    arguments: dict[str, Any] = {"model": model, "config": config}
    if client is None:
        arguments["model_parameters"] = parameters
    else:
        del config["optimizer"]
        arguments["optimizer"] = client(parameters)
    if schedule is not None:
        arguments["lr_scheduler"] = schedule
    if block is None:
        return deepspeed.initialize(**arguments)[0]
    config["gradient_pruning"] = {"island": {"ranks": ranks}} | block
    engine = create(**arguments)[0]
    clock = VirtualClock()
    attach(engine, clock=Clock(clock.now_s, clock.sleep) if is_virtual else None)
    return engine


def train(
    engine: Any,
    first: int,
    last: int,
    on_step: Callable[[int], None] | None = None,
    spoil: tuple[int, int] | None = None,
) -> list[float]:
    """Steps first .. last on this rank's own data; the mean loss of each.

    Args:
        engine: an engine.
        first: from 1.
        last: the last one.
        on_step: called after each of them.
        spoil: a step and an island, whose gradients are infinite in it.
    """
    losses = []
    for step in range(first, last + 1):
        total, count = 0.0, engine.gradient_accumulation_steps()
        for micro_step in range(count):
            loss = engine(batch(step, micro_step, dist.get_rank()))
            is_spoilt = spoil is not None and spoil == (step, engine.mpu.island)
            engine.backward(loss * float("inf") if is_spoilt else loss)
            engine.step()
            total += float(loss.detach())
        losses.append(total / count)
        if on_step is not None:
            on_step(step)
    return losses


def everywhere(value: Any) -> list[Any]:
    """Every rank's value. Collective: all ranks."""
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, value)
    return answers


def masters(engine: Any) -> dict[str, torch.Tensor]:
    """The fp32 weights that the island steps, whole and flat, by name. Collective: the island."""
    handle = engine.gradprune
    mine = [(*p.key, p.own.clone()) for p in handle.shards.every_piece()]
    group = handle.groups.get_data_parallel_group()
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, mine, group=group)
    parts = sorted((part for answer in answers for part in answer), key=lambda part: part[:2])
    names = dict.fromkeys(name for name, _, _ in parts)
    return {name: torch.cat([own for n, _, own in parts if n == name]) for name in names}


@contextmanager
def traffic() -> Iterator[list[tuple[str, int, list[int]]]]:
    """Every collective of this process inside: its name, its bytes, and the ranks it joins."""
    seen: list[tuple[str, int, list[int]]] = []
    kind = dist.ProcessGroup
    # What a class holds binds; what getattr gives of these does not.
    originals = {name: call for name, call in vars(kind).items() if name.startswith(MOVES)}

    def spy(name: str) -> Any:
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            # An all-gather has its whole output, too: the smaller of the two is what is sent.
            sizes = [size for size in map(_bytes, args) if size]
            seen.append((name, min(sizes, default=0), dist.get_process_group_ranks(group)))
            return originals[name].__get__(group)(*args, **kwargs)

        return call

    for name in originals:
        setattr(kind, name, spy(name))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(kind, name, original)


def _bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, (list, tuple)) else 0


def way(engine: Any, steps: int) -> tuple[dict[str, torch.Tensor], float]:
    """Train; the weights at the end, and the largest step that a weight has made."""
    before, largest = weights_of(engine), 0.0
    for step in range(1, steps + 1):
        train(engine, step, step)
        after = weights_of(engine)
        largest = max(largest, *(float((after[n] - before[n]).abs().max()) for n in after))
        before = after
    return before, largest


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two weights."""
    assert one.keys() == other.keys()
    return max(float((one[n].float() - other[n].float()).abs().max()) for n in one)
