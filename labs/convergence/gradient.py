"""Pruned gradients with error feedback into one AdamW: the product's gradient mode."""

from __future__ import annotations

import torch

from ds_gradprune.bucket.layout import kept_per_chunk
from ds_gradprune.law.schedule import scheduled
from ds_gradprune.train import gradients as product
from ds_gradprune.train.stopwatch import Stopwatch
from labs.convergence import grid
from labs.convergence.adamw import clip_
from labs.convergence.base import Setting, SharedGradient
from labs.convergence.ranks import SILENT, Ranks, is_pruned


class GradientSimulation(SharedGradient):
    """Dense in the warm-up; then every worker's gradient becomes the sum of what all have sent.

    The product's reduction waits inside, so the ranks run on threads. Their sums are equal.
    """

    def __init__(self, setting: Setting, method: grid.Gradient) -> None:
        super().__init__(setting)
        self.config = method.config(setting.train.warmup_steps)
        self._ranks = Ranks(setting.workers, method.exchange)
        self.reducers = [
            product.GradientPruning(
                channel,
                Stopwatch(lambda: 0.0),
                value_bits=self.config.value_bits,
                error_feedback=self.config.error_feedback,
            )
            for channel in self._ranks.channels
        ]
        self._tensors = [
            product.Gradient(f"tensor {number}", shape.numel(), is_pruned(shape))
            for number, shape in enumerate(setting.gpt.shapes)
        ]

    def step(self, step: int, tokens: torch.Tensor, lr: float) -> float:
        """See `Simulation.step`."""
        if step < self.setting.train.warmup_steps:
            return self.dense_step(tokens, lr)
        loss, gradient = self.gradients(tokens)
        choice = scheduled(self.config, step + 1)
        k = kept_per_chunk(self.config.density.initial) if choice is None else choice.k

        def reduce(rank: int) -> None:
            reducer = self.reducers[rank]
            reducer.begin()
            reducer.reduce(gradient[rank], self._tensors, k, step=step + 1, signals=SILENT)
            reducer.commit(applied=True)

        self._ranks.at_once(reduce, range(self.setting.workers))
        self.received_bits += self._ranks.take_received_bits()
        mean = gradient[:1] / self.setting.workers
        clip_(mean, self.setting.train.clip)
        self.adam.step(self.shared, mean, lr)
        return loss

    def close(self) -> None:
        """See `Simulation.close`."""
        self._ranks.close()
