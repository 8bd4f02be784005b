"""What people add to a training, with pruned gradients at ZeRO stages 0 to 2, on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.errors import RankMismatchError
from tests.helpers import zero_bench
from tests.helpers.ranks import run_cases
from tests.helpers.shard_bench import batch, start_deepspeed, weights_of
from tests.helpers.zero_bench import PRUNED, SGD, SGD_LR, everywhere
from tests.helpers.zero_cases import crc_of
from tests.helpers.zero_gradient_bench import Spare
from tests.helpers.zero_models import Lion, rich, two_groups

BLOCK: dict[str, Any] = {key: PRUNED[key] for key in PRUNED if key != "warmup"} | {
    "prune": "gradient"
}
STEPS = 5
MUON = {"type": "Muon", "params": {"lr": 2e-3, "muon_lr": 0.02, "adam_lr": 2e-3}}
LOW_MASTERS = {
    "enabled": True,
    "bf16_master_weights_and_grads": True,
    "bf16_optimizer_states": True,
}


class Routed(Spare):
    """Every rank trains a layer of its own beside those of all."""

    def forward(self, tokens: torch.Tensor, use_spare: bool = False) -> torch.Tensor:
        return super().forward(tokens, use_spare or dist.get_rank() == 1)


KINDS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "adapters": ({"model": lambda: rich(trains_all=False)}, (0, 1, 2)),
    "rich": (
        {"model": rich, "groups": two_groups, "gradient_accumulation_steps": 2} | SGD,
        (0, 1, 2),
    ),
    "clients": (
        {
            "client": Lion,
            "schedule": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: 1.0 / (1 + step)
            ),
            "zero_allow_untested_optimizer": True,
        },
        (0, 1, 2),
    ),
    "autocast": ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, (0, 1, 2)),
    "compiled": ({}, (0, 2)),
    "muon": ({"optimizer": MUON}, (0, 1, 2)),
    "bf16-masters": ({"dtype": "bf16", "bf16": LOW_MASTERS}, (1, 2)),
    "routed": ({"model": Routed}, (0,)),
    "direct": ({"gradient_accumulation_steps": 2}, (1, 2)),
}
"""Feature -> options of an engine, and the stages that DeepSpeed has it at."""


def make(name: str, stage: int, block: dict[str, Any] | None, **more: Any) -> Any:
    """An engine with a feature; None: plain DeepSpeed's."""
    options = dict(KINDS[name][0]) | more
    build: Callable[[], Any] | None = options.pop("model", None)
    torch.manual_seed(0)
    model = None if build is None else build()
    engine = zero_bench.make(block, ranks=1, model=model, stage=stage, **options)
    if name == "compiled":
        engine.compile(backend="eager")
    return engine


def train(engine: Any, *, direct: bool = False) -> list[float]:
    """The mean loss of every step on this rank; `direct`: by `loss.backward()`."""
    losses = []
    count = engine.gradient_accumulation_steps()
    for step in range(1, STEPS + 1):
        total = 0.0
        for micro_step in range(count):
            loss = engine(batch(step, micro_step, dist.get_rank()))
            if direct:
                engine.scale(loss).backward()
            else:
                engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / count
        losses.append(total)
    return losses


def feature(name: str, stage: int) -> dict[str, Any]:
    """Plain DeepSpeed, a dense run and a pruned one."""
    direct = name == "direct"
    plain = make(name, stage, None)
    train(plain, direct=direct)
    dense = make(name, stage, BLOCK | {"warmup_steps": 99})
    train(dense, direct=direct)
    dense.gradprune.detach()
    engine = make(name, stage, BLOCK)
    losses = train(engine, direct=direct)
    handle = engine.gradprune
    found = {
        "plain": crc_of(weights_of(plain)),
        "dense": crc_of(weights_of(dense)),
        "pruned": everywhere(crc_of(weights_of(engine))),
        "loss": abs(handle.report.loss - sum(everywhere(losses[-1])) / dist.get_world_size()),
        "density": handle.report.wire_bytes / handle.report.dense_bytes,
        "elements": handle.report.dense_bytes // engine.module.gain.element_size(),
        "trained": sum(p.numel() for p in engine.module.parameters() if p.requires_grad),
    }
    handle.detach()
    return found


def summed(stage: int) -> dict[str, Any]:
    """Gradients that are summed over two ranks, at half the rate: the same steps, bit by bit."""
    crcs = []
    for rate, operation in ((SGD_LR, "mean"), (SGD_LR / 2, "sum")):
        options = SGD | {"optimizer": {"type": "SGD", "params": {"lr": rate}}}
        engine = zero_bench.make(
            BLOCK, ranks=1, stage=stage, gradient_allreduce_op=operation, **options
        )
        train(engine)
        crcs.append(crc_of(weights_of(engine)))
        engine.gradprune.detach()
    return {"crcs": crcs}


def mixed(stage: int) -> dict[str, Any]:
    """Layers of one's own where DeepSpeed would add up the gradients of different ones."""
    engine = zero_bench.make(BLOCK, ranks=1, model=Routed(), stage=stage)
    try:
        train(engine)
    except RankMismatchError as exc:
        return {"told": str(exc)}
    return {"told": "nothing"}


def run_all(cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Name -> what a case found on this rank."""
    start_deepspeed()
    torch.compiler.set_stance("default")
    functions = {"feature": feature, "summed": summed, "mixed": mixed, "eagerly": eagerly}
    return run_cases(cases, functions.__getitem__)


def eagerly(name: str, stage: int) -> dict[str, Any]:
    """`feature` without compiling DeepSpeed's own optimizer."""
    torch.compiler.set_stance("force_eager")
    try:
        return feature(name, stage)
    finally:
        torch.compiler.set_stance("default")
