"""What islands refuse at a ZeRO stage, and in which words."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ds_gradprune.errors import GradPruneError
from tests.helpers.shard_bench import Odd, start_deepspeed
from tests.helpers.zero_bench import PRUNED, make

OFFLOAD = {"device": "cpu"}
MUON = {"type": "Muon", "params": {"lr": 2e-3, "muon_lr": 0.02, "adam_lr": 2e-3}}


class Modes(torch.optim.SGD):
    """As schedule-free optimizers, it has modes of its own."""

    def train(self) -> None:
        """Swap the weights."""

    def eval(self) -> None:
        """Swap them back."""


def experts() -> nn.Module:
    """A model with a mixture of experts."""
    from deepspeed.moe.layer import MoE

    model = Odd()
    model.experts = MoE(16, nn.Linear(16, 16), num_experts=4, ep_size=1)
    return model


def stages() -> nn.Module:
    """A model in two pipeline stages."""
    from deepspeed.pipe import PipelineModule

    layers = [nn.Linear(16, 16), nn.Linear(16, 16)]
    made: nn.Module = PipelineModule(layers, num_stages=2, loss_fn=nn.functional.mse_loss)
    return made


def sparse() -> nn.Module:
    """A model whose embedding would have sparse gradients."""
    model = Odd()
    model.embed = nn.Embedding(64, 16, sparse=True)
    return model


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "zero": more}


REFUSED: dict[str, dict[str, Any]] = {
    "zero_hpz_partition_size": zero(3, zero_hpz_partition_size=2),
    "mics_shard_size": zero(3, mics_shard_size=2),
    "zero_quantized_weights": zero(3, zero_quantized_weights=True),
    "zero_quantized_gradients": zero(3, zero_quantized_gradients=True),
    "offload_param.device nvme": zero(3, offload_param={"device": "nvme", "nvme_path": "/tmp"}),
    "offload_optimizer.device nvme": zero(
        3, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}
    ),
    "offload_optimizer.ratio below 1": zero(3, offload_optimizer=OFFLOAD | {"ratio": 0.5}),
    "offload_optimizer.super_offload": zero(3, offload_optimizer=OFFLOAD | {"super_offload": True}),
    "zenflow": zero(2, zenflow={"topk_ratio": 0.1}),
    "sequence_parallel_size": {"sequence_parallel_size": 2},
    "tensor_parallel.autotp_size": {"tensor_parallel": {"autotp_size": 2}},
    "a PipelineModule": {"model": stages},
    "mixture of experts": {"model": experts, "stage": 2},
    "Muon turns gradients into updates": {"stage": 2, "optimizer": MUON},
    "fp16 under torch_autocast": {
        "stage": 2,
        "torch_autocast": {"enabled": True, "dtype": "float16"},
    },
    "its train() and eval() rewrite the weights": {
        "client": lambda parameters: Modes(parameters, lr=0.1),
    },
    "must divide the number of ranks, got 3": {"ranks": 3},
    "compile.deepcompile": {"stage": 2, "compile": {"deepcompile": True}},
    "hybrid_engine.enabled": {"hybrid_engine": {"enabled": True}},
    "nn.Embedding(sparse=True)": {"model": sparse},
    "bf16_master_weights_and_grads": {
        "stage": 1,
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True},
    },
    "gradient_allreduce_op": {"gradient_allreduce_op": "sum"},
}
"""Words of the message -> what is asked for."""

PIPELINE = "a PipelineModule"
ALIKE = (
    PIPELINE,
    "sequence_parallel_size",
    "tensor_parallel.autotp_size",
    "mixture of experts",
    "zenflow",
    "fp16 under torch_autocast",
    "compile.deepcompile",
    "hybrid_engine.enabled",
    "nn.Embedding(sparse=True)",
)
"""Those that pruned gradients cannot serve either."""
GRADIENT_REFUSED = {name: REFUSED[name] for name in ALIKE} | {
    "zero_optimization.stage 3": {"stage": 3}
}
GRADIENT = {"prune": "gradient", "island": {"ranks": 2}, "timeout_s": 60}


def run_refusals() -> dict[str, Any]:
    """Two islands of two ranks: what was said, after how many calls of DeepSpeed's own."""
    from ds_gradprune.deepspeed import initialize

    start_deepspeed()
    calls: list[Any] = []
    original = initialize._original

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    initialize._original = counted
    found = {}
    cases = [(name, asked, PRUNED) for name, asked in REFUSED.items()]
    cases += [(f"gradient, {name}", asked, GRADIENT) for name, asked in GRADIENT_REFUSED.items()]
    for name, asked, block in cases:
        options = dict(asked)
        model = options.pop("model", Odd)()
        try:
            make(block, model=model, **options)
            found[name] = "accepted"
        except GradPruneError as exc:
            found[name] = f"{type(exc).__name__}: {exc}"
        except Exception as exc:
            found[name] = f"DeepSpeed's own {type(exc).__name__}: {exc}"
    return found | {"engines": len(calls)}
