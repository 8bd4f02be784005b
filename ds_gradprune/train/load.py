"""Buckets of a gradient vector on their way: one message, from its selection to its arrival.

A vector may travel in several messages, one after the other, that are read as one when all of them
are there: what is sent of a bucket does not depend on which buckets travel with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.message import Arrived, Message
from ds_gradprune.wire.channel import Channel, Pending


@dataclass(frozen=True, slots=True)
class Sent:
    """What the payloads of a vector say.

    Attributes:
        k: kept elements per full chunk.
        step: optimizer step under way, counted from 1.
        signals: this island's measurements.
        scale: loss scale of the vector.
    """

    k: int
    step: int
    signals: RankSignals
    scale: float = 1.0


class Load:
    """A message under way.

    Args:
        message: not written yet.
        channel: carries it.
        first: number of its first bucket in the vector.

    Attributes:
        first: see there.
    """

    def __init__(self, message: Message, channel: Channel, first: int = 0) -> None:
        self.first = first
        self._message = message
        self._channel = channel
        self._payloads: torch.Tensor | None = None
        self._pending: Pending | None = None

    def write(self) -> None:
        """Select and encode; nothing but scratch memory changes. Local."""
        self._payloads = self._message.write()

    def start(self) -> Pending:
        """Let the payloads travel.

        Raises:
            TransportError: an earlier call of the transport has failed.

        Collective: all ranks, same order.
        """
        assert self._payloads is not None
        self._pending = self._channel.start(
            self._payloads, self._message.sizes, self._message.layouts
        )
        return self._pending

    def wait(self) -> None:
        """Return when everything has arrived. Collective.

        Raises:
            TransportError, WireFormatError, RankMismatchError: it has not.
        """
        assert self._pending is not None
        self._pending.wait()

    def arrived(self) -> Arrived:
        """What has arrived, verified. Local; see `Message.arrived`."""
        assert self._pending is not None
        return self._message.arrived(self._pending)

    def abandon(self) -> None:
        """Nothing of it was applied, on any rank. Local."""
        if self._pending is not None:
            self._pending.finish(applied=False)


class Joined:
    """What has arrived of all buckets of a vector, as if it had been one message.

    Args:
        parts: in the order of their buckets.

    Attributes:
        num_buckets: of the vector.
        nonfinite: ranks whose values hold inf or nan.
        factors: by how much each delivery is scaled; empty: by nothing. See `clip`.
    """

    def __init__(self, parts: Sequence[Arrived]) -> None:
        self._parts = parts
        self._places = [(part, number) for part in parts for number in range(part.num_buckets)]
        self.num_buckets = len(self._places)
        self.nonfinite = sorted({rank for part in parts for rank in part.nonfinite})
        self.factors: list[float] = []

    def deliveries(self, number: int, device: torch.device) -> Iterator[tuple[SparseBlock, bool]]:
        """See `Arrived.deliveries`."""
        part, own = self._places[number]
        return part.deliveries(own, device)

    def factor(self, delivery: int) -> float:
        """By how much a delivery is scaled."""
        return self.factors[delivery] if self.factors else 1.0

    def sent(self, number: int, device: torch.device) -> SparseBlock | None:
        """See `Arrived.sent`."""
        part, own = self._places[number]
        return part.sent(own, device)

    def finish(self, *, applied: bool) -> None:
        """See `Arrived.finish`."""
        for part in self._parts:
            part.finish(applied=applied)
