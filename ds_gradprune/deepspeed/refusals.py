"""Features whose gradients or weights would take another way than the one we know: refused by name.

All functions are local.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

GRADIENT, UPDATE = "gradient", "update"


@dataclass(frozen=True)
class Refusal:
    """A feature that we do not serve.

    Attributes:
        words: what it is called, after "does not support"; {optimizer} stands for its class.
        holds: whether an engine uses it.
        modes: where it is refused.
    """

    words: str
    holds: Callable[[Any], bool]
    modes: tuple[str, ...] = (GRADIENT, UPDATE)


REFUSALS = (
    Refusal("pipeline parallelism", lambda engine: engine.pipeline_parallelism),
    Refusal("mixture of experts", lambda engine: engine.has_moe_layers),
    Refusal("sequence parallelism", lambda engine: engine.sequence_parallel_size > 1),
    Refusal("tensor parallelism", lambda engine: engine.mp_world_size > 1),
    Refusal(
        "fp16 under torch_autocast", lambda engine: engine.torch_autocast_z0_gradscaler is not None
    ),
    Refusal(
        'fp16 under torch_autocast at ZeRO stages 1 and 2 with prune = "gradient" (set '
        'torch_autocast.dtype to "bfloat16")',
        lambda engine: getattr(engine.optimizer, "torch_autocast_gradscaler", None) is not None,
        (GRADIENT,),
    ),
    Refusal(
        'zero_optimization.zenflow with prune = "gradient" (remove the key)',
        lambda engine: "ZenFlow" in type(engine.optimizer).__name__,
        (GRADIENT,),
    ),
    Refusal(
        "engine.enable_backward_allreduce = False",
        lambda engine: not engine.enable_backward_allreduce,
    ),
    Refusal("DeepCompile", lambda engine: _calls_true(engine, "is_deepcompile_enabled")),
    Refusal("the hybrid engine", lambda engine: type(engine).__name__ == "DeepSpeedHybridEngine"),
    Refusal("nn.Embedding(sparse=True)", lambda engine: has_sparse_embedding(engine.module)),
    Refusal(
        "an engine that is attached already",
        lambda engine: engine.__dict__.get("gradprune") is not None,
    ),
    Refusal(
        'gradients that are summed, not averaged (gradient_allreduce_op), with prune = "update"',
        lambda engine: not engine.gradient_average,
        (UPDATE,),
    ),
    Refusal(
        '{optimizer} with prune = "update" (its train() and eval() rewrite the weights: use the '
        'optimizer without them and a learning rate schedule, or prune = "gradient")',
        lambda engine: has_modes(engine.basic_optimizer),
        (UPDATE,),
    ),
)


def refusals(engine: Any, prune: str) -> list[str]:
    """What of an engine we do not serve, in the words of the table.

    Args:
        engine: a DeepSpeed engine with an optimizer.
        prune: "gradient" or "update".
    """
    optimizer = type(engine.basic_optimizer).__name__
    return [
        refusal.words.replace("{optimizer}", optimizer)
        for refusal in REFUSALS
        if prune in refusal.modes and refusal.holds(engine)
    ]


def _calls_true(engine: Any, name: str) -> bool:
    method = getattr(engine, name, None)
    return bool(method()) if callable(method) else False


def has_sparse_embedding(module: torch.nn.Module) -> bool:
    """Whether a layer's gradients would be sparse tensors."""
    return any(isinstance(m, torch.nn.Embedding) and m.sparse for m in module.modules())


def has_modes(optimizer: Any) -> bool:
    """Schedule-free optimizers swap what the parameters hold between training and evaluation."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
