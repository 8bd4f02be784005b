"""A rank of a simulated run that prunes gradients, and its count of what it has put in."""

from __future__ import annotations

import math
from typing import Any

import torch

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.train.gradients import Gradient, GradientPruning
from ds_gradprune.wire.channel import Channel
from labs.faults.rank import BUCKET_NUMEL, EPSILON, NUMEL, SHAPES, Rank


class GradientRank(Rank):
    """A rank that prunes gradients; its replica steps by plain descent."""

    def __init__(self, config: GradientPruningConfig, channel: Channel, seed: int) -> None:
        super().__init__(config, channel, seed)
        self.weights = torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))
        self.pruning = GradientPruning(
            channel,
            self.loop.stopwatch,
            value_bits=config.value_bits,
            error_feedback=True,
            bucket_numel=BUCKET_NUMEL,
        )
        self.learned = torch.zeros(NUMEL, dtype=torch.float64)
        self.delivered = torch.zeros(NUMEL, dtype=torch.float64)
        numels = [math.prod(shape) for shape in SHAPES]
        gradients = [
            Gradient(f"tensor {i}", numel, len(SHAPES[i]) > 1) for i, numel in enumerate(numels)
        ]
        cut = numels[0] + numels[1]
        self._parts = ((slice(0, cut), gradients[:2]), (slice(cut, NUMEL), gradients[2:]))
        """Two reductions in a step, as a model of two buckets makes them."""

    def step(self, *, spoil: bool = False) -> None:
        """See `Rank.step`."""
        loop = self.loop
        loop.begin_step()
        gradient = self.noise()
        total = gradient.clone()
        if spoil:
            total[7] = float("nan")
        self.channel.advance(loop.exchange_step)
        self.pruning.begin()
        signals = loop.signals(2.0 / loop.exchange_step, nonfinite=spoil)
        announcement = self.announce(signals)
        bad = loop.decision.density == 1.0 and any(
            header.signals.nonfinite for header in announcement.headers()
        )
        for here, gradients in self._parts:
            if loop.decision.density == 1.0:
                self.pruning.reduce_dense(total[here], gradients, nonfinite=bad)
                continue
            self.pruning.reduce(
                total[here],
                gradients,
                self.k,
                step=loop.exchange_step,
                signals=signals,
                agreed=announcement.headers,
            )
        applied = bool(torch.isfinite(total).all())
        self.pruning.commit(applied=applied)
        if applied:
            self.learned += gradient.double()
            self.delivered += total.double()
            self.weights.add_(total, alpha=-0.01)
            self.roundings += 4 * (self.channel.world_size + 2)
        loop.begin_exchange()
        self.finish(
            [header.signals for header in announcement.headers()],
            self.pruning.take_dense_bytes(),
        )
        loop.end_step()

    def settle(self) -> None:
        """See `Rank.settle`: nothing is ever under way."""

    def agreed(self) -> list[torch.Tensor]:
        """See `Rank.agreed`."""
        return [self.weights]

    def is_finite(self) -> bool:
        """See `Rank.is_finite`."""
        return bool(torch.isfinite(self.weights).all())

    def state(self) -> dict[str, Any]:
        """See `Rank.state`."""
        return {
            "loop": self.loop.state_dict(),
            "shared": self.weights,
            "residuals": self.pruning.residuals.state_dict(),
            "channel": self.channel.state_dict(),
            "learned": self.learned,
            "delivered": self.delivered,
            "roundings": self.roundings,
        }

    def load(self, state: dict[str, Any], first: dict[str, Any]) -> None:
        """See `Rank.load`."""
        self.loop.take(self.loop.read(state["loop"]))
        self.weights.copy_(first["shared"])
        self.pruning.residuals.take(self.pruning.residuals.read(state["residuals"]))
        self.channel.load_state_dict(state["channel"])
        self.learned, self.delivered = state["learned"], state["delivered"]
        self.roundings = state["roundings"]

    def balance(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """See `Rank.balance`: gradients less the residual; the sums that were applied."""
        residual = torch.zeros(NUMEL, dtype=torch.float64)
        owed = torch.zeros(NUMEL)
        state, number = self.pruning.residuals.state_dict(), 0
        for here, gradients in self._parts:
            start = here.start
            for gradient in gradients:
                if gradient.key in state:
                    residual[start : start + gradient.numel] = state[gradient.key].double()
                start += gradient.numel
            for bucket in self.pruning.buckets(gradients):
                place = slice(here.start + bucket.start, here.start + bucket.stop)
                self.channel.pay(number, bucket.layout, owed[place])
                number += 1
        self.channel.settle(applied=False)
        largest = float(residual.abs().max()) + float(self.delivered.abs().max()) + 1.0
        bound = self.roundings * EPSILON * largest * self.channel.world_size
        return self.learned - residual - owed.double(), self.delivered, bound
