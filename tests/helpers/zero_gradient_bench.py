"""Engines that prune gradients at ZeRO stages 1 and 2, of every kind; beside them plain ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.helpers.shard_bench import (
    MIN_NUMEL,
    WIDTH,
    Odd,
    batch,
    ds_config,
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
