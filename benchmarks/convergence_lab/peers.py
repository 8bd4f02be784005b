"""Other people's methods, simulated: what they compute, not their code."""

from __future__ import annotations

import torch

from benchmarks.convergence_lab.adamw import clip_
from benchmarks.convergence_lab.base import Setting, SharedGradient, ring_bits
from benchmarks.convergence_lab.grid import PowerSgd


class OneBitAdamSimulation(SharedGradient):
    """Tang et al., 1-bit Adam, ICML 2021, algorithm 1: worker and server compress with feedback.

    A scale is the mean magnitude of the whole vector. A worker receives one bit per element of its
    own part from every other (all-to-all), and one bit per element of every other part.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._errors = torch.zeros(setting.workers, setting.gpt.numel)
        self._server_error = torch.zeros(1, setting.gpt.numel)

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
        sent = _signs(self._errors)
        self._errors -= sent
        self._server_error += sent.mean(0, keepdim=True)
        self.adam.m = _signs(self._server_error)
        self._server_error -= self.adam.m
        self.adam.steps += 1
        self.adam.apply(self.shared, lr)
        self.received_bits += ring_bits(1.0 * self.setting.gpt.numel + 32 * workers, workers)
        return loss


def _signs(rows: torch.Tensor) -> torch.Tensor:
    return torch.where(rows < 0, -1.0, 1.0) * rows.abs().mean(1, keepdim=True)


class PowerSgdSimulation(SharedGradient):
    """Vogels et al., PowerSGD, NeurIPS 2019, algorithm 1: error feedback and warm start.

    Matrices whose factors would not be smaller, and vectors, are sent whole in fp32.
    """

    def __init__(self, setting: Setting, method: PowerSgd) -> None:
        super().__init__(setting)
        self._rank = method.rank
        self._errors = torch.zeros(setting.workers, setting.gpt.numel)
        generator = torch.Generator().manual_seed(setting.seed)
        self._starts = {
            index: torch.randn(size[1], method.rank, generator=generator)
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
        aggregate = torch.zeros(1, self.setting.gpt.numel)
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
