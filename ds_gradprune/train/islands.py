"""Update mode: what an island has gained over the shared weights is pruned and exchanged.

A round, from the exchange that ends it::

    prepare   select what moved most in own - shared, and encode it       nothing has changed
    start     the payloads travel
    deliver   wait, and check everything that has arrived                 nothing has changed
    commit    every delivery moves the shared weights by factor * value, in rank order; the own
              weights keep their residual, own - shared - sent             cannot fail

So a failure, wherever it happens, leaves own and shared weights as they were. Between start and
commit the island may go on training: `own` is read again at the commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ds_gradprune.bucket.apply import Move, move_at_once, scatter_add
from ds_gradprune.errors import NonFiniteError
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.clip import factors
from ds_gradprune.train.dense import DenseExchange
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.message import Arrived, Memory, Message, Source, Stamp
from ds_gradprune.train.outer import OuterRule
from ds_gradprune.train.shared_weights import Bound, SharedWeights
from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.channel import Channel, Pending
from ds_gradprune.wire.traffic import ring_all_reduce_bytes


class Prepared(Protocol):
    """One exchange of all buckets, from its preparation to its commit.

    Attributes:
        sizes: bytes of every payload; equal on all islands. Empty: they need not be compared.
    """

    sizes: Sequence[int]

    def write(self) -> None:
        """Select and encode; nothing but scratch memory changes. Local."""

    def start(self) -> None:
        """Let the payloads travel. Collective: all islands."""

    def wait(self) -> None:
        """Return when everything has arrived; may be called in another thread. Collective."""

    def deliver(self) -> list[int]:
        """Wait and check everything; raises, or returns the islands with inf or nan. Collective."""

    def commit(self) -> None:
        """Apply everything; nothing in it can fail. Local."""

    def abort(self) -> None:
        """Apply nothing: some rank could not deliver. Local."""


class Islands:
    """The algorithm of update mode on one rank.

    Args:
        weights: own and shared weights.
        channel: between the same-index ranks of all islands.
        stopwatch: waiting counts as "wire" there.
        value_bits: bits of a value on the wire.
        scale: factor on the islands' mean update.
        rule: what moves the shared weights besides.
        kept: where progress waits that was not sent; None: in the own weights, and used at once.
        clip: an island's update counts at most for so many times the median norm; None: as it is.

    Attributes:
        weights: see there.
        channel: see there.
        stopwatch: see there.
        value_bits: see there.
        scale: see there.
        rule: see there.
        kept: see there.
        clip: see there.
        memory: scratch memory, kept.
        have_parted: the islands have stepped alone, so their own weights differ. A fact of the
            run, kept in its checkpoints, not derived from the configuration.
    """

    def __init__(
        self,
        weights: SharedWeights,
        channel: Channel,
        stopwatch: Stopwatch,
        *,
        value_bits: int,
        scale: float,
        rule: OuterRule,
        kept: KeptResidual | None = None,
        clip: float | None = None,
    ) -> None:
        self.weights = weights
        self.clip = clip
        self.rule = rule
        self.kept = kept
        self.have_parted = False
        self.scale = scale
        self.channel = channel
        self.stopwatch = stopwatch
        self.value_bits = value_bits
        self.memory = Memory()

    @property
    def factor(self) -> float:
        """Weight of one island's update in the move of the shared weights."""
        return self.scale / self.channel.world_size

    def dense_bytes(self) -> int:
        """What this rank would send in an exchange without pruning."""
        return ring_all_reduce_bytes(4 * self.weights.numel, self.channel.world_size)

    def prepare(
        self,
        k: int,
        *,
        step: int,
        signals: RankSignals,
        hides: bool = False,
        unscaled: bool = False,
    ) -> Prepared:
        """Prepare to send the progress of this island; changes nothing. Local.

        Args:
            k: kept elements per chunk.
            step: optimizer step that the exchange follows.
            signals: this rank's measurements, for the headers.
            hides: the island trains on between `write` and `commit`. With a residual that is kept
                aside its weights are copied meanwhile, 4 bytes per parameter.
            unscaled: the shared weights take the islands' mean update. `scale` makes up for what
                is not sent.
        """
        factor = 1.0 / self.channel.world_size if unscaled else self.factor
        return _Pruned(self, Stamp(step, self.channel.rank, k, signals), factor, hides=hides)

    def source(self, bound: Bound) -> Source:
        """What is selected from in a bucket: own - shared, and what is kept of it."""
        if self.kept is None:
            return Source(bound.layout, bound.own, bound.beside(), -1.0)
        kept = self.kept.of(bound, self.weights.stores[bound.store])
        return Source(bound.layout, bound.own, bound.beside(), -1.0, kept, self.kept.decay)

    def prepare_dense(self, nonfinite: Sequence[int]) -> Prepared:
        """Prepare to send the whole progress as it is. Local.

        Args:
            nonfinite: the islands whose weights hold inf or nan, agreed on.
        """
        return DenseExchange(self, nonfinite)


class _Pruned:
    """A pruned exchange."""

    def __init__(self, islands: Islands, stamp: Stamp, factor: float, *, hides: bool) -> None:
        self._islands = islands
        self._factor = factor
        self._copies = hides and islands.kept is not None
        self._before: list[tuple[torch.Tensor, ...]] = []
        sources = [islands.source(bound) for bound in islands.weights.bound()]
        self._message = Message(sources, stamp, islands.value_bits, islands.channel, islands.memory)
        self.sizes: Sequence[int] = self._message.sizes
        self._payloads: torch.Tensor | None = None
        self._pending: Pending | None = None
        self._arrived: Arrived | None = None

    def write(self) -> None:
        self._payloads = self._message.write()
        if self._copies:
            bounds = self._islands.weights.bound()
            self._before = [tuple(own.clone() for own in bound.own) for bound in bounds]

    def start(self) -> None:
        assert self._payloads is not None
        self._pending = self._islands.channel.start(
            self._payloads, self.sizes, self._message.layouts
        )

    def wait(self) -> None:
        assert self._pending is not None
        self._pending.wait()

    def deliver(self) -> list[int]:
        assert self._pending is not None
        try:
            with self._islands.stopwatch.phase("wire"):
                self._pending.wait()
            self._arrived = self._message.arrived(self._pending)
            self._clip(self._arrived)
        except Exception:
            self._islands.memory.abandon()
            self._pending.finish(applied=False)
            raise
        return self._arrived.nonfinite

    def _clip(self, arrived: Arrived) -> None:
        bounds = self._islands.weights.bound()
        if self._islands.clip is not None and bounds and not arrived.nonfinite:
            device = bounds[0].own[0].device
            arrived.factors = factors(arrived, len(bounds), self._islands.clip, device)

    @torch.no_grad()
    def commit(self) -> None:
        assert self._arrived is not None
        # Own weights may have moved to other memory meanwhile: ask for them again.
        for number, bound in enumerate(self._islands.weights.bound()):
            self._apply(self._arrived, number, bound)
        self._arrived.finish(applied=True)

    def abort(self) -> None:
        if self._arrived is not None:
            self._arrived.finish(applied=False)

    def _apply(self, arrived: Arrived, number: int, bound: Bound) -> None:
        islands = self._islands
        shared = bound.beside()
        islands.rule.begin(
            bound.store, islands.weights.stores[bound.store], bound.start, bound.stop
        )
        if islands.kept is None:
            self._move(arrived, number, bound, shared)
        else:
            self._reset(islands.kept, arrived, number, bound, shared)
        bound.give_back(shared)

    def _move(self, arrived: Arrived, number: int, bound: Bound, shared: torch.Tensor) -> None:
        """Own weights keep what they have beyond the shared ones, less what was sent."""
        rule, factor, device = self._islands.rule, self._factor, bound.own[0].device
        blocks = None if arrived.factors else arrived.all_at_once(number, device)
        if blocks is not None:
            rank = self._islands.channel.rank
            move_at_once(bound.own, shared, blocks, rank=rank, factor=factor)
            for block in blocks:
                rule.note(block, factor)
        else:
            move = Move(bound.own, shared, bound.layout)
            for delivery, (block, is_own) in enumerate(arrived.deliveries(number, device)):
                weight = factor * arrived.factor(delivery)
                move.add(block, weight, is_own=is_own)
                rule.note(block, weight)
            apart = arrived.sent(number, device)
            if apart is not None:
                move.sent(apart)
            move.close()
        drift = rule.drift()
        if drift is not None:
            bound.shift(shared, drift)

    def _reset(
        self,
        residual: KeptResidual,
        arrived: Arrived,
        number: int,
        bound: Bound,
        shared: torch.Tensor,
    ) -> None:
        """Own weights become the shared ones; what was not sent is kept aside."""
        rule, factor, device = self._islands.rule, self._factor, bound.own[0].device
        kept = residual.of(bound, self._islands.weights.stores[bound.store])
        before = self._before[number] if self._copies else bound.own
        residual.gather(kept, bound, before, shared)
        for delivery, (block, is_own) in enumerate(arrived.deliveries(number, device)):
            if is_own:
                residual.sent(kept, block)
            weight = factor * arrived.factor(delivery)
            scatter_add(shared, block, weight)
            rule.note(block, weight)
        apart = arrived.sent(number, device)
        if apart is not None:
            residual.sent(kept, apart)
        drift = rule.drift()
        if drift is not None:
            shared.add_(drift.to(shared.device))
        for own, old, part in zip(bound.own, before, bound.split(shared), strict=True):
            # What was learned since the payloads were written stays.
            own.copy_(torch.sub(own, old).add_(part) if self._copies else part)


def refuse(nonfinite: Sequence[int], step: int) -> None:
    """End an exchange in which some island's weights are not finite.

    Raises:
        NonFiniteError: `nonfinite` names an island.
    """
    if nonfinite:
        raise NonFiniteError(
            f"the weights of island {', '.join(map(str, nonfinite))} hold inf or nan after step "
            f"{step}; the shared weights are still those of the exchange before. Resume from the "
            "last checkpoint with a lower learning rate or with gradient_clipping."
        )
