"""A small run that the laboratory's tests share."""

from __future__ import annotations

from typing import Any

import torch

from labs.convergence.adamw import learning_rate
from labs.convergence.base import Setting, Simulation
from labs.convergence.gpt import Gpt
from labs.convergence.gradient import GradientSimulation
from labs.convergence.grid import DiLoCo, Gradient, Model, Train, Update
from labs.convergence.islands import DiLoCoSimulation, UpdateSimulation

SHAPE = Model(n_layer=1, n_head=2, n_embd=64, context=16)
TRAIN = Train(batch=2, warmup_steps=2, lr_warmup_steps=1, lr=1e-3)
SETTING = Setting(Gpt(SHAPE, 70), TRAIN, workers=3, steps=8, seed=1)


def tokens(step: int, workers: int = 3) -> torch.Tensor:
    """(workers, 2, 17), other ones in every step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 70, (workers, 2, 17), generator=generator)


def train(simulation: Simulation, steps: int = 8) -> torch.Tensor:
    """The shared weights after so many steps."""
    for step in range(steps):
        simulation.step(step, tokens(step), learning_rate(TRAIN, step, steps))
    return simulation.shared[0]


def update(**fields: Any) -> UpdateSimulation:
    return UpdateSimulation(SETTING, Update(kind="update", name="u", **fields))


def gradient(**fields: Any) -> GradientSimulation:
    return GradientSimulation(SETTING, Gradient(kind="gradient", name="g", **fields))


def diloco(**fields: Any) -> DiLoCoSimulation:
    return DiLoCoSimulation(SETTING, DiLoCo(kind="diloco", name="d", **fields))


def parted(simulation: Simulation) -> torch.Tensor:
    """The shared weights when the warm-up is over."""
    for step in range(TRAIN.warmup_steps):
        simulation.step(step, tokens(step), learning_rate(TRAIN, step, 8))
    return simulation.shared[0].clone()
