"""One rank of a simulated run: it learns noise, exchanges it through the product, and counts.

What a rank learns in a step depends on the schedule's seed, its number and the step alone. So a run
that was resumed must end with the bits of one that was never broken.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import torch

from ds_gradprune import codec
from ds_gradprune.bucket.layout import kept_per_chunk
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import NonFiniteError
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.crc import crc_of
from ds_gradprune.train.loop import Loop
from ds_gradprune.wire.channel import Announcement, Channel

SHAPES = ((80, 60), (60,), (90, 70), (10,))
NUMEL = sum(math.prod(shape) for shape in SHAPES)
BUCKET_NUMEL = 8192  # two buckets
EPSILON = 2.0**-24
"""Half a unit in the last place of fp32, relative."""


class VirtualClock:
    """Every look at it costs a millisecond or so: what is measured is the same in every run."""

    def __init__(self) -> None:
        self._ticks = 0

    def now_s(self) -> float:
        """Seconds."""
        self._ticks += 1
        return self._ticks / 1024


class Rank(abc.ABC):
    """One rank.

    Args:
        config: the product's block.
        channel: to the others.
        seed: of what it learns.

    Attributes:
        loop: the product's.
        channel: see there.
        roundings: an upper bound of how often an element has been rounded.
    """

    def __init__(self, config: GradientPruningConfig, channel: Channel, seed: int) -> None:
        self.loop = Loop(config, VirtualClock().now_s)
        self.channel = channel
        self.roundings = 0
        self._config = config
        self._seed = seed

    @abc.abstractmethod
    def step(self, *, spoil: bool = False) -> None:
        """One optimizer step with whatever exchange is due. Collective."""

    @abc.abstractmethod
    def settle(self) -> None:
        """Apply what is under way. Collective."""

    @abc.abstractmethod
    def agreed(self) -> list[torch.Tensor]:
        """What must be equal on all ranks; may be written."""

    @abc.abstractmethod
    def is_finite(self) -> bool:
        """What would be saved holds no inf and no nan."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""

    @abc.abstractmethod
    def load(self, state: dict[str, Any], first: dict[str, Any]) -> None:
        """Continue; `first` is what rank 0 has saved."""

    @abc.abstractmethod
    def balance(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(numel,) float64: what it has put in; what everybody got; bound of their rounding."""

    def noise(self, salt: int = 0) -> torch.Tensor:
        """(NUMEL,) what this rank learns in the step under way."""
        step, rank = self.loop.exchange_step, self.channel.rank
        seed = ((self._seed * 1009 + step) * 31 + rank) * 7 + salt
        return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed % 2**63))

    @property
    def k(self) -> int:
        """Kept elements per chunk."""
        return kept_per_chunk(self.loop.decision.density)

    def announce(self, signals: RankSignals, sizes: Any = ()) -> Announcement:
        """Tell the others."""
        header = codec.encode_signals(
            step=self.loop.exchange_step, rank=self.channel.rank, k=self.k, signals=signals
        )
        return self.channel.announce(header, sizes)

    def finish(self, signals: list[RankSignals], dense_bytes: int) -> None:
        """The exchange is over."""
        before = self.loop.totals.steps
        report = self.loop.finish_exchange(
            signals, wire_bytes=self.channel.take_wire_bytes(), dense_bytes=dense_bytes
        )
        every = self._config.verify_every_steps
        if every and report.step // every > before // every:
            self.loop.note_weights(crc_of(self.agreed()))


def check_finite(rank: Rank, step: int) -> None:
    """As launch/train.py does before it saves.

    Raises:
        NonFiniteError: something is not finite.
    """
    if not rank.is_finite():
        raise NonFiniteError(f"weights hold inf or nan after step {step}, so nothing is saved.")
