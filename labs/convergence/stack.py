"""Runs that train side by side, in one pass: what an accelerator needs to be busy.

The runs of a stack have one model, one number of steps, and hyper-parameters that differ in the
learning rate alone. Rows of different runs never meet, so a run of a stack is the run alone, up to
the order in which products are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ds_gradprune.errors import NonFiniteError
from labs.convergence.adamw import AdamW, clip_, learning_rate
from labs.convergence.base import DenseSimulation, Setting, Simulation
from labs.convergence.gpt import Gradients
from labs.convergence.islands import IslandSimulation


class Together(Protocol):
    """Simulations that are stepped together.

    Attributes:
        simulations: one per run.
        stopped_at: of each: the step, from 1, after which a weight was inf or nan; None: no such.
    """

    simulations: Sequence[Simulation]
    stopped_at: list[int | None]

    def step(self, step: int, tokens: torch.Tensor) -> None:
        """One optimizer step of all that have not stopped.

        Args:
            step: counted from 0.
            tokens: (runs, workers, batch, context + 1).
        """


class Alone:
    """One run; see `Together`."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulations = [simulation]
        self.stopped_at: list[int | None] = [None]

    def step(self, step: int, tokens: torch.Tensor) -> None:
        """See `Together.step`."""
        simulation = self.simulations[0]
        setting = simulation.setting
        if self.stopped_at[0] is None:
            try:
                simulation.step(step, tokens[0], learning_rate(setting.train, step, setting.steps))
            except NonFiniteError:
                self.stopped_at[0] = step + 1


class Stack:
    """Dense runs, or runs of islands; see `Together`.

    Runs of one seed and learning rate share their dense warm-up.

    Args:
        simulations: all dense, or all of islands.
    """

    def __init__(self, simulations: Sequence[DenseSimulation | IslandSimulation]) -> None:
        self.simulations = simulations
        self.stopped_at: list[int | None] = [None] * len(simulations)
        first = self._first = simulations[0].setting
        self._are_islands = isinstance(simulations[0], IslandSimulation)
        starts = {(s.setting.seed, s.setting.train.lr): s.setting for s in simulations}
        numbers = {start: number for number, start in enumerate(starts)}
        self._row = [numbers[s.setting.seed, s.setting.train.lr] for s in simulations]
        runs = [self._row.index(number) for number in range(len(starts))]
        self._runs = torch.tensor(runs, device=first.device)
        self._starts: list[Setting] = list(starts.values())
        self._dense = Gradients(first.gpt, len(starts), first.device)
        self._dense_adam = AdamW(len(starts), first.decayed(), first.train)
        for row, start in zip(self._dense.weights, self._starts, strict=True):
            row.copy_(first.gpt.initial(start.seed))
        self._apart: Gradients | None = None
        self._adam: AdamW | None = None

    def step(self, step: int, tokens: torch.Tensor) -> None:
        """See `Together.step`."""
        if not self._are_islands or step < self._first.train.warmup_steps:
            self._step_dense(step, tokens)
            return
        if self._apart is None:
            self._part()
        assert self._apart is not None
        assert self._adam is not None
        self._apart(tokens.flatten(0, 1))
        clip_(self._apart.gradient, self._first.train.clip)
        rates = [
            rate * simulation.method.local_lr
            for simulation in self.simulations
            for rate in [self._rate(simulation.setting, step)] * self._first.workers
            if isinstance(simulation, IslandSimulation)
        ]
        self._adam.step(self._apart.weights, self._apart.gradient, rates)
        for simulation in self.simulations:
            if isinstance(simulation, IslandSimulation):
                simulation.fetch_ahead(step)
        for number, simulation in enumerate(self.simulations):
            if self.stopped_at[number] is None and isinstance(simulation, IslandSimulation):
                try:
                    simulation.exchange(step)
                except NonFiniteError:
                    self.stopped_at[number] = step + 1

    def _step_dense(self, step: int, tokens: torch.Tensor) -> None:
        self._dense(tokens[self._runs].flatten(1, 2))
        clip_(self._dense.gradient, self._first.train.clip)
        rates = [self._rate(start, step) for start in self._starts]
        self._dense_adam.step(self._dense.weights, self._dense.gradient, rates)
        for row, simulation in zip(self._row, self.simulations, strict=True):
            simulation.shared = self._dense.weights[row : row + 1]
            if isinstance(simulation, DenseSimulation):
                simulation.count(step)

    def _part(self) -> None:
        workers = self._first.workers
        self._apart = Gradients(
            self._first.gpt, workers * len(self.simulations), self._first.device
        )
        rows = [row for row in self._row for _ in range(workers)]
        self._adam = self._dense_adam.spread(rows)
        for number, simulation in enumerate(self.simulations):
            assert isinstance(simulation, IslandSimulation)
            simulation.shared = simulation.shared.clone()
            simulation.part(self._apart.weights[number * workers : (number + 1) * workers])
        del self._dense, self._dense_adam  # no dense step follows: a model's memory five times

    def _rate(self, setting: Setting, step: int) -> float:
        return learning_rate(setting.train, step, setting.steps)
