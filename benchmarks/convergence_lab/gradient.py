"""Pruned gradients with error feedback into one AdamW, and candidates for its second moment."""

from __future__ import annotations

import torch

from benchmarks.convergence_lab.adamw import clip_
from benchmarks.convergence_lab.base import Setting, SharedGradient
from benchmarks.convergence_lab.grid import Gradient
from benchmarks.convergence_lab.wire import Wire, lab_layout


class GradientSimulation(SharedGradient):
    """See `grid.Gradient` for the candidates."""

    def __init__(self, setting: Setting, method: Gradient) -> None:
        super().__init__(setting)
        self._method = method
        numel = setting.gpt.numel
        self._wire = Wire(lab_layout(setting.gpt.shapes, method.prune_vectors), method)
        self._owed = torch.zeros(setting.workers, numel)
        self._momentum: torch.Tensor | None = None
        self._since = torch.zeros(1, numel)

    def step(self, step: int, tokens: torch.Tensor, lr: float) -> float:
        """See `Simulation.step`."""
        warmup = self.setting.train.warmup_steps
        self._since += 1
        if step < warmup:
            self._since.zero_()
            return self.dense_step(tokens, lr)
        loss, gradient = self.gradients(tokens)
        self._owed += self._with_momentum(gradient)
        density = self.setting.density(self._method, step)
        swap = self._wire.swap(self._owed, density, self._score())
        self.received_bits += swap.received_bits
        aggregate = (swap.total / self.setting.workers)[None]
        clip_(aggregate, self.setting.train.clip)
        self._second_moment(aggregate, density)
        self.adam.move(self.shared, aggregate, lr)
        return loss

    def _with_momentum(self, gradient: torch.Tensor) -> torch.Tensor:
        if not self._method.local_momentum:
            return gradient
        beta1 = self.setting.train.beta1
        if self._momentum is None:
            self._momentum = self.adam.m.expand_as(gradient).clone()
            self.adam.beta1 = 0.0
        self._momentum.mul_(beta1).add_(gradient, alpha=1 - beta1)
        return self._momentum

    def _score(self) -> torch.Tensor | None:
        if self._method.score == "magnitude":
            return None
        return (self.adam.v[0] + 1e-16).rsqrt()

    def _second_moment(self, aggregate: torch.Tensor, density: float) -> None:
        """Bring AdamW's second moment up to date by the method's rule."""
        rule, beta2 = self._method.second_moment, self.setting.train.beta2
        if rule == "frozen":
            return
        square = aggregate.square()
        if rule == "tau":  # a spike gathers `since` steps; its square counts as one of them
            hit = aggregate != 0
            square = torch.where(hit, square / self._since.clamp(min=1.0), 0.0)
            self._since.masked_fill_(hit, 0.0)
        elif rule == "floor":
            union = 1.0 - (1.0 - density) ** self.setting.workers
            beta2 = max(beta2, 1.0 - 0.1 * union)
        self.adam.v.mul_(beta2).add_(square, alpha=1 - beta2)
        self.adam.v_steps += 1
