"""A small engine in its island, at any ZeRO stage, and what tests ask of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

VOCAB, WIDTH, BATCH = 64, 16, 4
MIN_NUMEL = 100


class Odd(nn.Module):
    """Odd sizes, so that partitions end inside parameters; a frozen layer, a buffer, a number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up = nn.Linear(WIDTH, 33)
        self.down = nn.Linear(33, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.gain = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens[:, :-1])
        hidden = self.norm(hidden + self.down(torch.relu(self.up(hidden))) + self.frozen(hidden))
        logits = hidden @ self.embed.weight.T * self.gain
        return nn.functional.cross_entropy(
            logits.float().reshape(-1, VOCAB), tokens[:, 1:].reshape(-1)
        )


def batch(step: int, micro_step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro_step + rank)
    return (torch.randint(0, VOCAB, (BATCH, 1), generator=generator) + 3 * torch.arange(9)) % VOCAB


def start_deepspeed() -> Any:
    """Open DeepSpeed's backend on gloo; fp16 is slow on CPUs, but right."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(
        "gloo",
        init_method=f"file://{os.environ['DS_TEST_STORE']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        verbose=False,
    )
    return deepspeed


def ds_config(stage: int, dtype: str = "fp32", **extra: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 2e-3, "weight_decay": 0.1, "torch_adam": True},
        },
        "steps_per_print": None,
        "zero_optimization": {"stage": stage} | extra.pop("zero", {}),
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    return config | extra


def make_engine(
    groups: Any, *, model: nn.Module | None = None, split: bool = False, **options: Any
) -> Any:
    """An engine.

    Args:
        groups: its mpu; None: plain DeepSpeed.
        model: what is trained; None: a fresh `Odd`, the same on all ranks.
        split: two parameter groups.
        options: see `ds_config`.
    """
    import deepspeed

    from ds_gradprune.deepspeed.groups import kept

    torch.manual_seed(0)
    model = Odd() if model is None else model
    parameters: Any = list(model.parameters())
    if split:
        flat = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) < 2]
        matrices = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) > 1]
        parameters = [{"params": matrices}, {"params": flat, "weight_decay": 0.0}]
    with kept():
        return deepspeed.initialize(
            model=model, model_parameters=parameters, config=ds_config(**options), mpu=groups
        )[0]


def train(engine: Any, first: int, last: int) -> None:
    """Steps first .. last, on this rank's own data."""
    for step in range(first, last + 1):
        for micro_step in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(batch(step, micro_step, dist.get_rank())))
            engine.step()


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """The model's own, whole, whatever the stage. Collective: all ranks of the island."""
    import deepspeed

    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().clone() for name, p in named.items()}


class Bench:
    """One engine, its island and its shards."""

    def __init__(self, groups: Any, **options: Any) -> None:
        from ds_gradprune.deepspeed.shards import make_shards

        self.groups = groups
        self.engine = make_engine(groups, **options)
        self.shards = make_shards(self.engine, groups, MIN_NUMEL)

    @property
    def inner(self) -> Any:
        return self.groups.get_data_parallel_group()

    @contextmanager
    def averaging(self) -> Iterator[None]:
        """Steps inside are those of a dense warm-up."""
        if not self.engine.zero_optimization_stage():
            yield
            return
        original = self.engine._take_model_step

        def step(*args: Any, **kwargs: Any) -> None:
            for gradient in self.shards.gradients():
                assert gradient.is_contiguous()
                assert gradient.dim() == 1
                dist.all_reduce(gradient, group=self.groups.outer)
                gradient.div_(self.groups.num_islands)
            self.shards.gradients_changed()
            original(*args, **kwargs)

        self.engine._take_model_step = step
        with self.groups.in_force():
            yield
        del self.engine._take_model_step

    def alone(self, first: int, last: int) -> None:
        """The island steps alone."""
        with self.groups.in_force():
            train(self.engine, first, last)

    def weights(self) -> dict[str, torch.Tensor]:
        return weights_of(self.engine)

    def masters(self) -> dict[Any, torch.Tensor]:
        return {piece.key: piece.own.clone() for piece in self.shards.every_piece()}

    def take_first_islands(self) -> None:
        """Island 0's weights for all islands."""
        source = dist.get_global_rank(self.groups.outer, 0)
        for piece in self.shards.every_piece():
            dist.broadcast(piece.own, src=source, group=self.groups.outer)
        self.shards.publish()


def everywhere(value: Any, group: Any) -> list[Any]:
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, value, group=group)
    return answers


def alike(tensors: dict[str, torch.Tensor], group: Any) -> bool:
    """All ranks of the group hold the same bits."""
    bits = {name: t.float().numpy().tobytes() for name, t in tensors.items()}
    answers = everywhere(bits, group)
    return all(answer == answers[0] for answer in answers)


def same(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
