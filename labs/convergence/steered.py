"""Islands whose density the product's law chooses, on a simulated link that changes.

The law sees the losses of the small GPT that is trained here, and the times of a model of 124M
parameters: `labs.control.rounds_plant` says what its steps and exchanges take, chance included.
What it decides is what the small GPT exchanges. So the loss of a density that follows a link can be
compared with that of one density for all rates, at equal bits.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch

from ds_gradprune import law as control
from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.train.islands import Islands
from ds_gradprune.train.scale import sparse_scale
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.wire.channel import Channel
from labs.control.rounds_plant import Passed, Plant, signals_of
from labs.control.traces import MBIT, Trace
from labs.convergence.base import Setting
from labs.convergence.grid import Steering, Update
from labs.convergence.islands import UpdateSimulation


def trace_of(steering: Steering, steps: int) -> Trace:
    """The link of a run: its rates in turn, over and over."""
    rates = [
        MBIT * steering.rates_mbit[step // steering.hold_steps % len(steering.rates_mbit)]
        for step in range(steps)
    ]
    return Trace("turns", tuple(rates))


class SteeredSimulation(UpdateSimulation):
    """Update mode under the law.

    Args:
        setting: of the run; its seed is also that of the link's chance.
        method: whose `steered` says what the link does and what the law may move.
    """

    def __init__(self, setting: Setting, method: Update) -> None:
        super().__init__(setting, method)
        assert method.steered is not None
        self._plant = Plant(trace_of(method.steered, setting.steps), setting.workers, setting.seed)
        self._state, self._decision = control.start(self.config)
        self._losses: list[float] = []
        self._first = 0
        self._last: Passed | None = None
        self._link_s = 0.0
        self._logs: dict[float, list[float]] = defaultdict(list)

    def make(self, weights: SharedWeights, channel: Channel) -> Islands:
        """See `IslandSimulation.make`: the scale follows the density, as in the product."""
        islands = super().make(weights, channel)
        config = self.config
        islands.sparse_scale = sparse_scale(config.update_scale, config.residual_form)
        return islands

    def step(self, step: int, tokens: torch.Tensor, lr: float) -> float:
        """See `Simulation.step`."""
        loss = super().step(step, tokens, lr)
        self._losses.append(loss)
        if self._is_due(step):
            self._steer(step)
        return loss

    def k(self, step: int) -> int:
        """See `IslandSimulation.k`: as the law has decided."""
        return round(self._decision.density * CHUNK_NUMEL)

    def notes(self) -> dict[str, float]:
        """See `Simulation.notes`.

        Also link_s, seconds of all steps after the warm-up, and for every rate the share of the
        elements that was sent per step, geometric mean over the exchanges.
        """
        shares = {
            f"share_at_{rate / MBIT:g}": math.exp(math.fsum(logs) / len(logs))
            for rate, logs in self._logs.items()
        }
        return super().notes() | {"link_s": self._link_s} | shares

    def _is_due(self, step: int) -> bool:
        return step + 1 == self._decision.step

    def _steer(self, step: int) -> None:
        """An exchange has passed: the law hears of it, and decides on the next one."""
        k, first = self.k(step + 1), self._first
        signals = signals_of(self._plant, self._losses, first, step, self._last, self.config)
        if step >= self.setting.train.warmup_steps:
            interval = step + 1 - first
            self._link_s += interval * self._plant.step_s(first, step, k, 0)
            share = k / CHUNK_NUMEL / interval
            self._logs[self._plant.trace.rates[step]].append(math.log(share))
        self._last, self._first = self._plant.passed(first, step, k), step + 1
        self._state, self._decision = control.update(self.config, self._state, signals)
