"""Where DeepSpeed skips a step with inf or nan by itself, and where all ranks must stop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from ds_gradprune.deepspeed.poison import refuse_poison, skips
from ds_gradprune.errors import NonFiniteError
from ds_gradprune.law.signals import RankSignals

FINE = RankSignals(1.0, False, 0.1, 0.0, 0.0, 0, 0)
SICK = RankSignals(None, True, 0.1, 0.0, 0.0, 0, 0)


def engine(stage: int = 0, *, fp16: bool = False, optimizer: Any = None) -> Any:
    return SimpleNamespace(
        fp16_enabled=lambda: fp16, zero_optimization_stage=lambda: stage, optimizer=optimizer
    )


def zero(dtype: torch.dtype, **options: bool) -> Any:
    return SimpleNamespace(dtype=dtype, **options)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (engine(), False),
        (engine(fp16=True), True),
        (engine(optimizer=BF16_Optimizer.__new__(BF16_Optimizer)), True),
        (engine(2, optimizer=zero(torch.float32, compute_grad_norm=True)), True),
        (engine(2, optimizer=zero(torch.float32, compute_grad_norm=False)), False),
        (engine(1, optimizer=zero(torch.bfloat16, check_grad_overflow=True)), True),
        (engine(1, optimizer=zero(torch.bfloat16, check_grad_overflow=False)), False),
        (engine(3, optimizer=zero(torch.bfloat16)), True),
    ],
)
def test_deepspeed_skips_what_its_source_says(made: Any, expected: bool) -> None:
    assert skips(made) is expected


def test_the_sick_ones_are_named() -> None:
    refuse_poison(engine(), [FINE, FINE], 3, "rank")
    refuse_poison(engine(fp16=True), [FINE, SICK], 3, "rank")
    with pytest.raises(NonFiniteError, match="gradients of island 0, 2 hold inf or nan in step 3"):
        refuse_poison(engine(), [SICK, FINE, SICK], 3, "island")
