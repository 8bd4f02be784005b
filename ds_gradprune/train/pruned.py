"""Update mode's pruned exchange: what moved most, from its selection to its commit.

Where an exchange hides and the residual is used, the own weights go ahead of it::

    write     own += (scale - 1) * sent         the landing, if all islands had sent the same
    commit    own -= (scale - 1) * sent         and then as an exchange that was waited for

For what the islands agree on, the landing then changes nothing: it came when it was sent. Without
this it comes late by (scale - 1) times the step. With momentum 0.9 and one step of delay, gradient
descent on a curvature K is stable up to K = 27 where the scale is the root of 2 at once, up to 2.4
where its excess is late (results/convergence_cpu_202611_hidden_scale.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ds_gradprune.bucket.apply import Move, move_at_once, scatter_add, take_at_once
from ds_gradprune.train.clip import factors
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.message import Arrived, Message, Stamp
from ds_gradprune.train.shared_weights import Bound
from ds_gradprune.wire.channel import Pending

if TYPE_CHECKING:
    from ds_gradprune.train.islands import Islands


class PrunedExchange:
    """An exchange of what moved most; see `islands.Prepared`.

    Args:
        islands: the algorithm.
        stamp: what the payloads say.
        hides: the island trains on between `write` and `commit`.
        unscaled: the shared weights take the islands' mean update, see `Islands.prepare`.

    Attributes:
        sizes: bytes of every payload.
    """

    def __init__(self, islands: Islands, stamp: Stamp, *, hides: bool, unscaled: bool) -> None:
        self._islands = islands
        self._unscaled = unscaled
        self._ahead = 0.0
        self._anticipates = hides and islands.kept is None
        self._copies = hides and islands.kept is not None
        self._before: list[tuple[torch.Tensor, ...]] = []
        sources = [islands.source(bound) for bound in islands.weights.bound()]
        bits = islands.unpruned_bits if unscaled else islands.value_bits
        self._message = Message(sources, stamp, bits, islands.channel, islands.memory)
        self.sizes: Sequence[int] = self._message.sizes
        self._payloads: torch.Tensor | None = None
        self._pending: Pending | None = None
        self._arrived: Arrived | None = None

    def write(self) -> None:
        """Select and encode; the own weights go ahead of what hides. Local."""
        self._payloads = self._message.write()
        if self._anticipates and self._message.is_finite:
            count = self._islands.channel.world_size
            self._go_ahead(count * self._factor_of(count) - 1.0)
        if self._copies:
            bounds = self._islands.weights.bound()
            self._before = [tuple(own.clone() for own in bound.own) for bound in bounds]

    def start(self) -> None:
        """Let the payloads travel. Collective: all islands."""
        assert self._payloads is not None
        self._pending = self._islands.channel.start(
            self._payloads, self.sizes, self._message.layouts
        )

    def wait(self) -> None:
        """Return when everything has arrived. Collective."""
        assert self._pending is not None
        self._pending.wait()

    def deliver(self) -> list[int]:
        """Wait and check everything; the islands with inf or nan. Collective."""
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
        """Apply everything; nothing in it can fail. Local."""
        assert self._arrived is not None
        self._go_ahead(-self._ahead)
        # Own weights may have moved to other memory meanwhile: ask for them again.
        for number, bound in enumerate(self._islands.weights.bound()):
            self._apply(self._arrived, number, bound)
        self._arrived.finish(applied=True)

    def abort(self) -> None:
        """Apply nothing. Local."""
        self._go_ahead(-self._ahead)
        if self._arrived is not None:
            self._arrived.finish(applied=False)

    def _factor(self, arrived: Arrived, number: int) -> float:
        """Weight of one island's update in the move of the shared weights.

        Those count that have taken part: some may have been lost since the exchange before.
        """
        return self._factor_of(arrived.num_senders(number))

    def _factor_of(self, count: int) -> float:
        """The same for so many islands."""
        if self._unscaled:
            return 1.0 / count
        return self._islands.factor_at(self._message.stamp.k, count)

    @torch.no_grad()
    def _go_ahead(self, by: float) -> None:
        """Own weights move by so many times what was sent; what they move by in all is kept."""
        if by == 0.0:
            return
        for number, bound in enumerate(self._islands.weights.bound()):
            block = self._message.sent(number, bound.own[0].device)
            block.values.mul_(-by)
            block.dense.mul_(-by)
            take_at_once(bound.own, bound.beside(), block)
        self._ahead += by

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
        rule, device = self._islands.rule, bound.own[0].device
        factor = self._factor(arrived, number)
        blocks = None if arrived.factors else arrived.all_at_once(number, device)
        if blocks is not None:
            place = arrived.place(number)
            move_at_once(bound.own, shared, blocks, rank=place, factor=factor)
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
        rule, device = self._islands.rule, bound.own[0].device
        factor = self._factor(arrived, number)
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
