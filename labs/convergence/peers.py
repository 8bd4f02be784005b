"""Other people's methods, simulated: what they compute, not their code."""

from __future__ import annotations

import torch

from labs.convergence.adamw import clip_
from labs.convergence.base import Setting, SharedGradient, ring_bits
from labs.convergence.grid import PowerSgd


class OneBitAdamSimulation(SharedGradient):
    """Tang et al., 1-bit Adam, ICML 2021, algorithm 1: worker and server compress with feedback.

    Every tensor has a scale of its own, 2-norm / sqrt(length), as in DeepSpeed's. A worker receives
    one bit per element of its own part from every other (all-to-all), and one bit per element of
    every other part; scales of both ways are fp32.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._errors = self.shared.new_zeros(setting.workers, setting.gpt.numel)
        self._server_error = torch.zeros_like(self.shared)

    def step(self, step: int, tokens: torch.Tensor, lr: float) -> float:
        """See `Simulation.step`."""
        train, workers = self.setting.train, self.setting.workers
        if step < train.warmup_steps:
            return self.dense_step(tokens, lr)
        loss, gradient = self.gradients(tokens)
        # The optimizer clips nothing by default; the mean's norm decides here as in the dense run.
        norm = float(gradient.mean(0).norm())
        gradient.mul_(min(1.0, train.clip / (norm + 1e-6)))
        self._errors += train.beta1 * self.adam.m + (1 - train.beta1) * gradient
        sent = self._signs(self._errors)
        self._errors -= sent
        self._server_error += sent.mean(0, keepdim=True)
        self.adam.m = self._signs(self._server_error)
        self._server_error -= self.adam.m
        self.adam.steps += 1
        self.adam.apply(self.shared, lr)
        tensors = len(self.setting.gpt.shapes)
        # A part's scales come from its owner, so there are `workers` times as many.
        numbers = self.setting.gpt.numel + 32 * workers * tensors
        self.received_bits += ring_bits(float(numbers), workers)
        return loss

    def _signs(self, rows: torch.Tensor) -> torch.Tensor:
        """Signs times scale; the sign of zero is +1."""
        signs = torch.where(rows < 0, -1.0, 1.0)
        for sign, view in zip(
            self.setting.gpt.views(signs), self.setting.gpt.views(rows), strict=True
        ):
            flat = view.flatten(1)
            scale = flat.norm(dim=1) / flat.shape[1] ** 0.5
            sign.mul_(scale.view(-1, *[1] * (sign.dim() - 1)))
        return signs


class PowerSgdSimulation(SharedGradient):
    """Vogels et al., PowerSGD, NeurIPS 2019, algorithm 1: error feedback and warm start.

    Matrices whose factors would not be smaller, and vectors, are sent whole in fp32.
    """

    def __init__(self, setting: Setting, method: PowerSgd) -> None:
        super().__init__(setting)
        self._rank = method.rank
        self._errors = self.shared.new_zeros(setting.workers, setting.gpt.numel)
        generator = torch.Generator().manual_seed(setting.seed)
        self._starts = {
            index: torch.randn(size[1], method.rank, generator=generator).to(setting.device)
            for index, size in enumerate(setting.gpt.shapes)
            if len(size) == 2 and method.rank * (size[0] + size[1]) < size.numel()
        }

    def step(self, step: int, tokens: torch.Tensor, lr: float) -> float:
        """See `Simulation.step`."""
        train, workers = self.setting.train, self.setting.workers
        if step < train.warmup_steps:
            return self.dense_step(tokens, lr)
        loss, gradient = self.gradients(tokens)
        self._errors += gradient
        aggregate = torch.zeros_like(self.shared)
        numbers = 0
        errors = self.setting.gpt.views(self._errors)
        means = self.setting.gpt.views(aggregate)
        for index, (error, mean) in enumerate(zip(errors, means, strict=True)):
            average = error.mean(0)
            if index not in self._starts:
                mean[0] = average
                error.zero_()
                numbers += average.numel()
                continue
            left, _ = torch.linalg.qr(average @ self._starts[index])
            right = average.t() @ left
            self._starts[index] = right
            mean[0] = left @ right.t()
            error -= mean
            numbers += left.numel() + right.numel()
        clip_(aggregate, train.clip)
        self.adam.step(self.shared, aggregate, lr)
        self.received_bits += ring_bits(32.0 * numbers, workers)
        return loss
