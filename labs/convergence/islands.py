"""Islands: every worker steps its own AdamW, and the product exchanges what they have learned.

Until warm-up is over the islands are one dense run, bit for bit, and part with copies of its
moments. Then `ds_gradprune.train.islands` works on every worker's row. An exchange needs no
threads: all ranks start, then all wait. With `owner_reduce` a rank that waits also starts the
second half, so there every rank waits on a thread of its own.
"""

from __future__ import annotations

import abc

import torch

from ds_gradprune.bucket.layout import CHUNK_NUMEL, kept_per_chunk
from ds_gradprune.law.schedule import scheduled
from ds_gradprune.train.islands import Islands, Prepared, refuse
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.outer import make_rule, update_scale
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.channel import Channel
from labs.convergence.adamw import clip_
from labs.convergence.base import Setting, SharedGradient
from labs.convergence.grid import DiLoCo, Update
from labs.convergence.nesterov import Nesterov
from labs.convergence.ranks import SILENT, Ranks, RowShards


class IslandSimulation(SharedGradient, abc.ABC):
    """What all methods with an optimizer on every worker share.

    Attributes:
        islands: one per worker; empty in the warm-up.
    """

    def __init__(self, setting: Setting, method: Update | DiLoCo) -> None:
        super().__init__(setting)
        self.islands: list[Islands] = []
        self._ranks = Ranks(setting.workers, method.exchange)
        self._in_turn = method.exchange == "all_gather"
        self._local_lr = method.local_lr
        self._every = method.sync_every
        self._begun: list[Prepared] = []
        self._begun_after = self._lands_after = 0

    @property
    def delay_steps(self) -> int:
        """Optimizer steps from an exchange to its commit."""
        return 0

    @abc.abstractmethod
    def make(self, weights: SharedWeights, channel: Channel) -> Islands:
        """The algorithm on one rank."""

    @abc.abstractmethod
    def k(self, step: int) -> int:
        """Kept elements per chunk at an exchange after `step`, counted from 1."""

    def step(self, step: int, tokens: torch.Tensor, lr: float) -> float:
        """See `Simulation.step`."""
        alone = step + 1 - self.setting.train.warmup_steps
        if alone <= 0:
            return self.dense_step(tokens, lr)
        if not self.islands:
            self._part()
        loss = float(self.apart(tokens).mean())
        clip_(self.apart.gradient, self.setting.train.clip)
        self.adam.step(self.apart.weights, self.apart.gradient, lr * self._local_lr)
        if self._begun and step + 1 == self._lands_after:
            self._land()
        if alone % self._every == 0:
            self._begin(step + 1)
            # The run's last exchange is waited for, as a checkpoint waits for it.
            if not self.delay_steps or step + 1 == self.setting.steps:
                self._land()
        return loss

    @torch.no_grad()
    def flushed(self) -> torch.Tensor:
        """See `Simulation.flushed`."""
        flushed = self.shared[0].clone()
        for number, islands in enumerate(self.islands):
            flushed.add_(self._owed(number), alpha=islands.factor)
        return flushed

    def notes(self) -> dict[str, float]:
        """How large the residual is beside the weights. All islands must agree on the weights."""
        if not self.islands:
            return {}
        crcs = {islands.weights.crc() for islands in self.islands}
        assert len(crcs) == 1, f"the shared weights differ between islands: {crcs}"
        norms = [float(self._owed(number).norm()) for number in range(len(self.islands))]
        return {"owed_part": sum(norms) / len(norms) / float(self.shared.norm())}

    def close(self) -> None:
        """See `Simulation.close`."""
        self._ranks.close()

    def _part(self) -> None:
        """The dense run becomes one island per worker."""
        self.apart.weights.copy_(self.shared.expand_as(self.apart.weights))
        self.adam = self.adam.copied(self.setting.workers)
        for row, channel in zip(self.apart.weights, self._ranks.channels, strict=True):
            shards = RowShards(self.setting.gpt.views(row[None]))
            self.islands.append(self.make(SharedWeights(shards), channel))

    def _begin(self, step: int) -> None:
        k, hides = self.k(step), self.delay_steps > 0
        self._begun = [
            islands.prepare(k, step=step, signals=SILENT, hides=hides) for islands in self.islands
        ]
        for prepared in self._begun:
            prepared.write()
            prepared.start()
        self._begun_after, self._lands_after = step, step + self.delay_steps

    def _land(self) -> None:
        def deliver(prepared: Prepared) -> None:
            refuse(prepared.deliver(), self._begun_after)

        if self._in_turn:
            for prepared in self._begun:
                deliver(prepared)
        else:
            self._ranks.at_once(deliver, self._begun)
        for prepared in self._begun:
            prepared.commit()
        self._begun = []
        self.shared[0].copy_(self.islands[0].weights.stores[0])
        self.received_bits += self._ranks.take_received_bits()

    def _owed(self, number: int) -> torch.Tensor:
        """(numel,) what an island has learned and not sent."""
        islands = self.islands[number]
        owed = self.apart.weights[number] - self.shared[0]
        if islands.kept is not None:
            for store in islands.kept.state_dict():
                owed += islands.kept.decay * store
        return owed


class UpdateSimulation(IslandSimulation):
    """Update mode, as the product's configuration asks for it."""

    def __init__(self, setting: Setting, method: Update) -> None:
        super().__init__(setting, method)
        self.config = method.config(setting.train.warmup_steps)

    def make(self, weights: SharedWeights, channel: Channel) -> Islands:
        """See `IslandSimulation.make`."""
        config = self.config
        return Islands(
            weights,
            channel,
            _unwatched(),
            value_bits=config.value_bits,
            scale=update_scale(channel.world_size, config.update_scale),
            rule=make_rule(config.slow_momentum, config.sync_every),
            kept=KeptResidual(config.residual_decay) if config.residual_form == "reset" else None,
        )

    @property
    def delay_steps(self) -> int:
        """See `IslandSimulation.delay_steps`: the product's."""
        return self.config.delay_steps

    def k(self, step: int) -> int:
        """See `IslandSimulation.k`: the product's ramp, then a pinned density."""
        choice = scheduled(self.config, step)
        return kept_per_chunk(self.config.density.initial) if choice is None else choice.k


class DiLoCoSimulation(IslandSimulation):
    """See `grid.DiLoCo`: the product's exchange of everything, under an outer rule of its own."""

    def __init__(self, setting: Setting, method: DiLoCo) -> None:
        super().__init__(setting, method)
        self._method = method

    def make(self, weights: SharedWeights, channel: Channel) -> Islands:
        """See `IslandSimulation.make`."""
        return Islands(
            weights,
            channel,
            _unwatched(),
            value_bits=self._method.value_bits,
            scale=self._method.outer_lr,
            rule=Nesterov(self._method.outer_momentum),
            kept=KeptResidual(1.0),
        )

    def k(self, step: int) -> int:
        """See `IslandSimulation.k`: nothing is pruned."""
        return CHUNK_NUMEL


def _unwatched() -> Stopwatch:
    return Stopwatch(lambda: 0.0)
