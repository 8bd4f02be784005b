"""What every engine of the race has in common: how its step is timed, its optimizer.

Times of a step, in seconds, add up to its wall clock: compute (forward, backward, optimizer), codec
(what compression costs on this rank) and comm (exposed communication: what the step waited for).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from labs.race.job import Recipe
from labs.race.onebit_adam import Kind


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step on one rank.

    Attributes:
        loss: training loss of this rank.
        wall_s: whole step, seconds.
        compute_s, codec_s, comm_s: its parts, see the module.
        payload_bytes: what the method itself says it sent; None: it does not say.
        density: share of elements sent; None: nothing is pruned.
        kind: "usual"; or "dense", not compressed, at first or in between; or "silent", without any
            exchange.
    """

    loss: float
    wall_s: float
    compute_s: float
    codec_s: float
    comm_s: float
    payload_bytes: int | None = None
    density: float | None = None
    kind: Kind = "usual"


class Engine(Protocol):
    """What the worker drives."""

    module: torch.nn.Module

    def calibrate(self, tokens: torch.Tensor) -> None:
        """Measure what is needed to tell the times of the coming steps apart. Local."""
        ...

    def step(self, tokens: torch.Tensor, number: int) -> StepTimes:
        """Train one step, counted from 1. Collective."""
        ...


def adamw(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """The optimizer of all methods but the simulated ones."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=recipe.lr,
        betas=(0.9, recipe.beta2),
        weight_decay=recipe.weight_decay,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all parameters this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
