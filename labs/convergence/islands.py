"""Islands: every worker steps its own AdamW, and the product exchanges what they have learned.

Until a dense warm-up is over the islands are one dense run, bit for bit, and part with copies of
its moments. Then `ds_gradprune.train.islands` works on every worker's row. An exchange needs no
threads: all ranks start, then all wait. With `owner_reduce` a rank that waits also starts the
second half, so there every rank waits on a thread of its own.
"""

from __future__ import annotations

import abc
import math

import torch

from ds_gradprune.bucket.layout import CHUNK_NUMEL, kept_per_chunk
from ds_gradprune.law.schedule import scheduled
from ds_gradprune.train.islands import Islands, Prepared, refuse
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.outer import make_rule
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
        method: of the grid.
    """

    def __init__(self, setting: Setting, method: Update | DiLoCo) -> None:
        super().__init__(setting)
        self.islands: list[Islands] = []
        self.method: Update | DiLoCo = method
        self._ranks = Ranks(setting.workers, method.exchange)
        self._in_turn = method.exchange == "all_gather"
        self._trained = self._own = self._landed = torch.zeros(0)
        self._coming: torch.cuda.Event | None = None
        self._begun: list[Prepared] = []
        self._begun_after = self._lands_after = 0

    @property
    def dense_steps(self) -> int:
        """The first steps, in which the islands are one dense run."""
        return self.setting.train.warmup_steps

    @property
    def warmup_every(self) -> int:
        """Steps between exchanges from then until the warm-up is over."""
        return 1

    @property
    def warmup_doubles(self) -> bool:
        """They begin one step apart, and each interval is twice as long as the one before."""
        return False

    @property
    def warmup_delay(self) -> int:
        """Optimizer steps from an unpruned exchange to its commit."""
        return self.delay_of(self.warmup_every)

    def delay_of(self, interval: int) -> int:
        """Optimizer steps from an exchange to its commit, where exchanges come so often."""
        return 0

    @abc.abstractmethod
    def make(self, weights: SharedWeights, channel: Channel) -> Islands:
        """The algorithm on one rank."""

    @abc.abstractmethod
    def k(self, step: int) -> int:
        """Kept elements per chunk at an exchange after `step`, counted from 1."""

    def step(self, step: int, tokens: torch.Tensor, lr: float) -> float:
        """See `Simulation.step`."""
        if step < self.dense_steps:
            return self.dense_step(tokens, lr)
        if not self.islands:
            self.part(self.apart.weights)
            self.adam = self.adam.copied(self.setting.workers)
        loss = float(self.apart(tokens).mean())
        clip_(self.apart.gradient, self.setting.train.clip)
        self.adam.step(self.apart.weights, self.apart.gradient, lr * self.method.local_lr)
        self.exchange(step)
        return loss

    def part(self, trained: torch.Tensor) -> None:
        """The dense run becomes one island per worker.

        Args:
            trained: (workers, numel), what their optimizers will step.
        """
        self._trained = self._own = trained
        trained.copy_(self.shared.expand_as(trained))
        if self.setting.exchange_device != self.setting.device:
            self._own = torch.empty(trained.shape, pin_memory=trained.is_cuda)
            self._landed = torch.empty(trained.shape[1:], pin_memory=trained.is_cuda)
            self._fetch()
        for row, channel in zip(self._own, self._ranks.channels, strict=True):
            shards = RowShards(self.setting.gpt.views(row[None]))
            self.islands.append(self.make(SharedWeights(shards), channel))

    def exchange(self, step: int) -> None:
        """What the product does after an optimizer step, counted from 0."""
        if self._begun and step + 1 == self._lands_after:
            self._land()
        if self._is_due(step):
            if self._begun:
                self._land()
            self._begin(step + 1)
            # The run's last exchange is waited for, as a checkpoint waits for it.
            if self._lands_after == step + 1 or step + 1 == self.setting.steps:
                self._land()

    def fetch_ahead(self, step: int) -> None:
        """Start what `exchange(step)` fetches from an accelerator: one wait for many runs."""
        if self._own.is_pinned() and self._is_due(step):
            self._own.copy_(self._trained, non_blocking=True)
            self._coming = torch.cuda.Event()
            self._coming.record()

    @torch.no_grad()
    def flushed(self) -> torch.Tensor:
        """See `Simulation.flushed`."""
        flushed = self.shared[0].clone()
        for number, islands in enumerate(self.islands):
            flushed.add_(self._owed(number).to(flushed.device), alpha=islands.factor)
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

    def _begin(self, step: int) -> None:
        self._fetch()
        is_warmup = step <= self.setting.train.warmup_steps
        delay_steps = self.warmup_delay if is_warmup else self.delay_of(self.method.sync_every)
        k = CHUNK_NUMEL if is_warmup else self.k(step)
        self._begun = [
            islands.prepare(k, step=step, signals=SILENT, hides=delay_steps > 0, unscaled=is_warmup)
            for islands in self.islands
        ]
        for prepared in self._begun:
            prepared.write()
            prepared.start()
        self._begun_after, self._lands_after = step, step + delay_steps

    def _land(self) -> None:
        def deliver(prepared: Prepared) -> None:
            refuse(prepared.deliver(), self._begun_after)

        if self._lands_after > self._begun_after:
            self._fetch()
        if self._in_turn:
            for prepared in self._begun:
                deliver(prepared)
        else:
            self._ranks.at_once(deliver, self._begun)
        for prepared in self._begun:
            prepared.commit()
        self._begun = []
        store = self.islands[0].weights.stores[0]
        if self._own is self._trained:
            self.shared[0].copy_(store)
        else:  # the next fetch, which is waited for, comes after these
            self._trained.copy_(self._own, non_blocking=True)
            self.shared[0].copy_(self._landed.copy_(store), non_blocking=True)
        bits = self._ranks.take_received_bits()
        if self._begun_after > self.setting.train.warmup_steps:
            self.received_bits += bits

    def _fetch(self) -> None:
        """What was learned since is exchanged on the host, if it is not learned there."""
        if self._coming is not None:
            self._coming.synchronize()
            self._coming = None
        elif self._own is not self._trained:
            self._own.copy_(self._trained)

    def _is_due(self, step: int) -> bool:
        alone = step + 1 - self.setting.train.warmup_steps
        if alone < 0:
            since = step + 1 - self.dense_steps
            if self.warmup_doubles and since < 2 * self.warmup_every:
                return (since + 1).bit_count() == 1
            return (since + self.warmup_doubles) % self.warmup_every == 0
        return alone % self.method.sync_every == 0

    def _owed(self, number: int) -> torch.Tensor:
        """(numel,) what an island has learned and not sent."""
        islands = self.islands[number]
        self._fetch()
        owed = self._own[number] - self.shared[0].to(self._own.device)
        if islands.kept is not None:
            for store in islands.kept.state_dict():
                owed += islands.kept.decay * store
        return owed


class UpdateSimulation(IslandSimulation):
    """Update mode, as the product's configuration asks for it."""

    def __init__(self, setting: Setting, method: Update) -> None:
        super().__init__(setting, method)
        self.config = method.config(setting.train.warmup_steps)
        self._method = method

    def make(self, weights: SharedWeights, channel: Channel) -> Islands:
        """See `IslandSimulation.make`."""
        config = self.config
        return Islands(
            weights,
            channel,
            _unwatched(),
            value_bits=config.value_bits,
            unpruned_bits=self._method.warmup_bits,
            scale=config.update_scale or math.sqrt(channel.world_size),
            rule=make_rule(config.slow_momentum, config.sync_every),
            kept=KeptResidual(config.residual_decay) if config.residual_form == "reset" else None,
        )

    @property
    def dense_steps(self) -> int:
        """See `IslandSimulation.dense_steps`."""
        steps = self.setting.train.warmup_steps
        return min(steps, self._method.warmup_dense) if self.config.warmup != "dense" else steps

    @property
    def warmup_every(self) -> int:
        """See `IslandSimulation.warmup_every`."""
        return self._method.warmup_every

    @property
    def warmup_doubles(self) -> bool:
        """See `IslandSimulation.warmup_doubles`."""
        return self._method.warmup_doubles

    @property
    def warmup_delay(self) -> int:
        """See `IslandSimulation.warmup_delay`: the product's, unless one is given."""
        given = self._method.warmup_delay
        return self.config.delay_of(self.warmup_every, unpruned=True) if given is None else given

    def delay_of(self, interval: int) -> int:
        """See `IslandSimulation.delay_of`: the product's."""
        return self.config.delay_of(interval)

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
