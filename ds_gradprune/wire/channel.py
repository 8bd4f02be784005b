"""The channel: one exchange of bucket payloads between the ranks of a group.

An exchange, as all ranks make it::

    announcement = channel.announce(header, sizes)     travels while this rank selects
    announcement.headers()                             every rank's header, found to agree
    pending = channel.start(message, sizes, layouts)   travels while this rank computes
    pending.proceed()                                  once, somewhere between; may be left out
    pending.wait()
    pending.payloads(bucket)                           check, read and apply them
    pending.finish(applied=True)                       memory goes back

A message is the payloads of all buckets one after the other. A bucket may travel in several
payloads, one for each of `channel.shares(layout)`: with `AllGather` that is the bucket itself, with
`OwnerReduce` one share for every rank. Code that goes through `shares` works with both::

    shares = channel.shares(layout)
    block = select(...)                                              # of the whole bucket
    parts = [codec.encode(share.of(block), ...) for share in shares] # what the message holds
    ...
    payloads = pending.payloads(bucket)
    for first in range(0, len(payloads), len(shares)):               # one delivery of the bucket
        for share, payload in zip(shares, payloads[first:]):
            codec.read_body(header, payload, share.layout, out=share.of(block))
        move.add(block, factor)

Sizes that differ between ranks must not reach a collective, because gloo then ends the process. So
the announcement has a fixed size and goes first; what the sizes follow from is compared in it.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ds_gradprune.bucket.layout import BucketLayout
from ds_gradprune.errors import CheckpointError
from ds_gradprune.wire.announcement import ROW_BYTES, Announcement
from ds_gradprune.wire.shares import Share
from ds_gradprune.wire.traffic import all_gather_bytes, ring_all_reduce_bytes
from ds_gradprune.wire.transport import Transport, Work

__all__ = ["Announcement", "Channel", "Pending"]


class Pending(abc.ABC):
    """An exchange under way.

    Until `finish` the message belongs to it, and after an error for ever: the caller drops its
    memory and takes new one. The same holds for what `payloads` has returned.
    """

    def proceed(self) -> None:  # noqa: B027 - most channels have no second half
        """Begin the second half of an exchange that has one; waits for the first.

        For callers that hide an exchange behind computation: half the wire time lies before, half
        after. `wait` does it where it was left out.

        Raises:
            TransportError, TransportTimeout: the first half failed.
            WireFormatError: a payload of the first half is damaged.
            RankMismatchError: a payload of the first half is of another step, bucket, k or codec
                than the own.

        Collective: all ranks, at the same place among their collectives.
        """

    @abc.abstractmethod
    def wait(self) -> None:
        """Return when everything is there; a second wait returns at once.

        Raises:
            TransportError, TransportTimeout: the exchange failed.
            WireFormatError, RankMismatchError: as `proceed`.

        Collective: all ranks, same order.
        """

    @abc.abstractmethod
    def done(self) -> bool:
        """Whether `wait` would return at once. Local; what ranks decide must not depend on it."""

    @abc.abstractmethod
    def payloads(self, bucket: int) -> list[torch.Tensor]:
        """What has arrived of one bucket, after `wait`. Local.

        Args:
            bucket: its number in the message, from 0.

        Returns:
            uint8 tensors on the CPU, views of kept receive memory, valid until `finish`. With
            `AllGather` one per rank that took part, in rank order, the own included. With
            `OwnerReduce` one per share, in order: that share's sum over ranks. Each is a payload of
            the codec, whose header names the rank that wrote it.
        """

    @abc.abstractmethod
    def num_senders(self, bucket: int) -> int:
        """Ranks whose parts are in the payloads of one bucket. Local."""

    def place(self, bucket: int) -> int:
        """Which of `payloads` is this rank's own, where there is one per rank. Local."""
        return 0

    @abc.abstractmethod
    def sent(self, bucket: int) -> list[torch.Tensor]:
        """What this rank has put in of one bucket: views of the message, one per share. Local.

        What they decode to has left this rank: it is delivered, or another rank's to deliver.
        """

    @abc.abstractmethod
    def finish(self, *, applied: bool) -> None:
        """The exchange is over: its payloads are not looked at any more. Local.

        Memory goes back only after a `wait` that returned. A second call changes nothing. Where
        deliveries may still be dropped after they were added up, as in a step that the optimizer
        skips, `finish` waits for that decision.

        Args:
            applied: the deliveries were applied, on all ranks. False: on none, or it failed; what
                the channel itself keeps from exchange to exchange stays as it was before this one.

        Raises:
            ValueError: it was applied without having been waited for.
        """


class Channel(abc.ABC):
    """One rank's end of an exchange. Several exchanges may be under way.

    Args:
        transport: this rank's end of the group; closed with the channel.

    Attributes:
        rank: this rank, 0 .. world_size - 1.
    """

    def __init__(self, transport: Transport) -> None:
        self.rank = transport.rank
        self._transport = transport
        self._announced: tuple[int, ...] = ()
        self._wire_bytes = 0

    @property
    def world_size(self) -> int:
        """Number of ranks; where ranks may be lost, of the last finished call."""
        return self._transport.world_size

    @abc.abstractmethod
    def shares(self, layout: BucketLayout) -> tuple[Share, ...]:
        """In which payloads a bucket of this layout travels, in the order of the message. Local."""

    @abc.abstractmethod
    def start(
        self, message: torch.Tensor, sizes: Sequence[int], layouts: Sequence[BucketLayout]
    ) -> Pending:
        """Start the exchange of a message.

        Args:
            message: (sum of sizes,) uint8, CPU, contiguous: for every bucket its shares' payloads.
            sizes: bytes of each payload; equal on all ranks.
            layouts: of the buckets, in order.

        Raises:
            ValueError: the sizes are not those of the message, or not those announced.
            TransportError: the transport is closed, or an earlier call of it has failed.

        Collective: all ranks, same order.
        """

    def announce(self, header: torch.Tensor, sizes: Sequence[int] = ()) -> Announcement:
        """Start the exchange of headers.

        Args:
            header: (64,) uint8, CPU; see `codec.encode_signals`.
            sizes: bytes of the payloads that `start` will be given next. They are compared over
                ranks, and `start` refuses others. Empty: none follow, or they are not compared.

        Raises:
            ValueError: the header has another size.
            TransportError: the transport is closed, or an earlier call of it has failed.

        Collective: all ranks, same order.
        """
        announcement = Announcement(self._transport, header, sizes)
        self._announced = tuple(sizes)
        self._wire_bytes += all_gather_bytes(ROW_BYTES, self.world_size)
        return announcement

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        """See `Transport.start_all_reduce`: the dense path. Collective: all ranks, same order."""
        work = self._transport.start_all_reduce(tensor)
        tensor_bytes = tensor.numel() * tensor.element_size()
        self._wire_bytes += ring_all_reduce_bytes(tensor_bytes, self.world_size)
        return work

    def pay(  # noqa: B027 - a channel that keeps nothing owes nothing
        self, bucket: int, layout: BucketLayout, vector: torch.Tensor, scale: float = 1.0
    ) -> None:
        """Add what this rank owes as an owner to what it puts into a dense sum. Local.

        Args:
            bucket: the number in the headers of its payloads.
            layout: of the bucket.
            vector: (layout.numel,) any floating dtype; changed in place.
            scale: loss scale of `vector`.
        """

    def settle(self, *, applied: bool) -> None:  # noqa: B027 - as `pay`
        """The dense sums since the last call are over. Local.

        Args:
            applied: on all ranks: what was paid is owed no more. False: on none.
        """

    def state_dict(self) -> dict[str, Any]:
        """What the channel keeps from exchange to exchange, for this rank's checkpoint. Local.

        Returns:
            Plain types and tensors; empty where it keeps nothing.
        """
        return {}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Can the channel continue from `state`? Changes nothing. Local.

        Raises:
            CheckpointError: the state is of another kind of channel, format, rank or world size.
        """
        if state:
            raise CheckpointError(
                "the checkpoint holds residuals of the owners of owner_reduce, and this run "
                "exchanges with all_gather, which has no owners. Resume with the exchange and the "
                "number of islands that saved it."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; empty means as before any exchange. Local.

        Raises:
            CheckpointError: see `check_state`; nothing has changed.
        """
        self.check_state(state)

    def take_wire_bytes(self) -> int:
        """Bytes that this rank has begun to send since the last call, announcements too. Local."""
        taken, self._wire_bytes = self._wire_bytes, 0
        return taken

    def advance(self, step: int) -> None:
        """Optimizer step `step` begins. Local; only emulated links care."""
        self._transport.advance(step)

    def close(self) -> None:
        """Close the transport. Local."""
        self._transport.close()

    def _check_message(
        self, message: torch.Tensor, sizes: Sequence[int], layouts: Sequence[BucketLayout]
    ) -> None:
        """Raise ValueError unless the message is what `start` says and what was announced."""
        if message.dtype is not torch.uint8 or message.shape != (sum(sizes),):
            raise ValueError(
                f"message must be uint8 of shape ({sum(sizes)},), the sum of its sizes, got "
                f"{message.dtype} of shape {tuple(message.shape)}"
            )
        num_payloads = sum(len(self.shares(layout)) for layout in layouts)
        if len(sizes) != num_payloads:
            raise ValueError(
                f"sizes must have one entry for each of the {num_payloads} shares of all buckets, "
                f"got {len(sizes)}"
            )
        announced, self._announced = self._announced, ()
        if announced and announced != tuple(sizes):
            raise ValueError(
                f"sizes must be those that were announced: {len(announced)} payloads of "
                f"{sum(announced)} bytes, got {len(sizes)} of {sum(sizes)}"
            )
