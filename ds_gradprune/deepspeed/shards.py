"""Where an engine keeps the fp32 weights that its optimizer steps, at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ds_gradprune.deepspeed.groups import Groups
from ds_gradprune.deepspeed.spans import Names
from ds_gradprune.deepspeed.zero0 import Zero0
from ds_gradprune.deepspeed.zero3 import Zero3
from ds_gradprune.deepspeed.zero12 import Zero12
from ds_gradprune.errors import UnsupportedError
from ds_gradprune.train.piece import Shards

_KINDS: dict[type, type[Zero0] | type[Zero12] | type[Zero3]] = {
    FP16_Optimizer: Zero0,
    FP16_UnfusedOptimizer: Zero0,
    BF16_Optimizer: Zero12,
    DeepSpeedZeroOptimizer: Zero12,
    DeepSpeedZeroOptimizer_Stage3: Zero3,
}


def make_shards(engine: Any, groups: Groups, min_numel: int) -> Shards:
    """The part of an engine's fp32 weights that this rank exchanges for its island.

    Args:
        engine: what `deepspeed.initialize` returned first, made with `groups` as its mpu.
        groups: the island.
        min_numel: a parameter with fewer elements is never pruned.

    Raises:
        UnsupportedError: the weights are not where we know them to be, not fp32, or the gradients
            take a way that we cannot follow.

    Local.
    """
    optimizer = engine.optimizer
    kind = _KINDS.get(type(optimizer))
    if kind is None and isinstance(optimizer, torch.optim.Optimizer):
        kind = Zero0
    if kind is None:
        raise UnsupportedError(
            f'prune = "update" does not know where {type(optimizer).__name__} keeps its fp32 '
            'weights. Take another optimizer, or set prune to "gradient".'
        )
    if getattr(optimizer, "torch_autocast_gradscaler", None) is not None:
        raise UnsupportedError(
            'prune = "update" does not support fp16 under torch_autocast: its scaler skips steps '
            "without a word. Set torch_autocast.dtype to bfloat16, or fp16.enabled."
        )
    return kind(engine, groups, Names(engine, min_numel))


def refused_by(ds_config: Mapping[str, Any]) -> list[str]:
    """What a DeepSpeed configuration asks for and islands cannot serve, by name. Local.

    Asked before `deepspeed.initialize`: some of it would create process groups of its own there.
    """
    zero = _block(ds_config, "zero_optimization")
    curriculum = ds_config
    for name in ("data_efficiency", "data_sampling", "curriculum_learning"):
        curriculum = _block(curriculum, name)
    offloads = {name: _block(zero, name) for name in ("offload_optimizer", "offload_param")}
    checks = {
        "zero_hpz_partition_size": _number(zero, "zero_hpz_partition_size", 1) > 1,
        "mics_shard_size": _number(zero, "mics_shard_size", -1) > 0,
        "zero_quantized_weights": zero.get("zero_quantized_weights") is True,
        "zero_quantized_gradients": zero.get("zero_quantized_gradients") is True,
        "zero_quantized_nontrainable_weights": zero.get("zero_quantized_nontrainable_weights")
        is True,
        "zenflow": bool(zero.get("zenflow")),
        "enable_sanity_checks": zero.get("enable_sanity_checks") is True,
        "pipeline_loading_checkpoint": zero.get("pipeline_loading_checkpoint") is True,
        **{f"{n}.device nvme": str(o.get("device")) == "nvme" for n, o in offloads.items()},
        "offload_optimizer.ratio below 1": _number(offloads["offload_optimizer"], "ratio", 1) < 1,
        "offload_optimizer.super_offload": offloads["offload_optimizer"].get("super_offload")
        is True,
    }
    tensors = _block(ds_config, "tensor_parallel")
    found = [f"zero_optimization.{name}" for name, is_present in checks.items() if is_present]
    if curriculum.get("enabled") is True:
        found.append("data_efficiency.data_sampling.curriculum_learning")
    if _number(tensors, "autotp_size", 0) > 1:
        found.append("tensor_parallel.autotp_size")
    return found


def _block(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    block = config.get(name)
    return block if isinstance(block, Mapping) else {}


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    return value if isinstance(value, (int, float)) else default
