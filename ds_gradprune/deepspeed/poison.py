"""Gradients that hold inf or nan, where DeepSpeed itself would step with them. All is local.

With fp16, with bf16 at its defaults, and at ZeRO stages 1 to 3, DeepSpeed 0.19.8 skips such a step,
on all ranks alike (`overflow` in fp16/loss_scaler.py, bf16_optimizer.py, zero/stage_1_and_2.py and
zero/stage3.py). Elsewhere one bad batch on one rank would make every weight nan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from ds_gradprune.errors import NonFiniteError
from ds_gradprune.law.signals import RankSignals


def refuse_poison(engine: Any, ranks: Sequence[RankSignals], step: int, whose: str) -> None:
    """End a run before a step with gradients that are not finite, unless DeepSpeed skips it.

    Args:
        engine: the DeepSpeed engine.
        ranks: what all have announced, in order; equal everywhere.
        step: the optimizer step under way, counted from 1.
        whose: what one of them is called: "rank" or "island".

    Raises:
        NonFiniteError: names them; on all ranks alike.
    """
    bad = [str(number) for number, signals in enumerate(ranks) if signals.nonfinite]
    if bad and not skips(engine):
        raise NonFiniteError(
            f"the gradients of {whose} {', '.join(bad)} hold inf or nan in step {step}. No rank "
            "has stepped, and all weights are those of the step before. Look at that batch, or "
            "resume from the last checkpoint with a lower learning rate or with gradient_clipping."
        )


def skips(engine: Any) -> bool:
    """Whether DeepSpeed leaves out a step whose gradient is not finite."""
    optimizer = engine.optimizer
    if engine.fp16_enabled() or isinstance(optimizer, BF16_Optimizer):
        return True
    if not int(engine.zero_optimization_stage()):
        return False
    is_bf16 = getattr(optimizer, "dtype", None) is torch.bfloat16
    return bool(getattr(optimizer, "check_grad_overflow" if is_bf16 else "compute_grad_norm", True))
