"""Where an engine keeps the fp32 weights that its optimizer steps, at every ZeRO stage."""

from __future__ import annotations

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
