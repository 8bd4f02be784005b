"""`OwnerReduce`: every share of a bucket has an owner, who sums it and sends the largest on.

Every rank sends every owner its share (all-to-all). The owners add them up in rank order, select
again with what they have kept from exchanges before, and send that to everybody (all-gather). Both
collectives carry about one message, so the traffic of a rank does not grow with the number of
ranks. The price is a second latency. Meant for more than 8 islands.

What an owner cannot send on is kept in its *owned residual*, fp32, 4 bytes for every element it
owns, and goes out later. Nothing is lost: what all ranks put in, and what owners had kept, is what
is delivered and what owners keep, but for the rounding of the sums to fp32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ds_gradprune import codec
from ds_gradprune.bucket.apply import scatter_add
from ds_gradprune.bucket.block import Scratch
from ds_gradprune.bucket.layout import BucketLayout
from ds_gradprune.bucket.select import select
from ds_gradprune.errors import CheckpointError, RankMismatchError
from ds_gradprune.wire.channel import Channel, Pending
from ds_gradprune.wire.memory import Memory
from ds_gradprune.wire.owned import OwnedResiduals
from ds_gradprune.wire.shares import Share, share_out
from ds_gradprune.wire.traffic import all_gather_bytes, all_to_all_bytes
from ds_gradprune.wire.transport import Transport, Work


class OwnerReduce(Channel):
    """Shares to their owners, sums to all.

    Args:
        transport: this rank's end of the group; closed with the channel.
        error_feedback: keep what an owner cannot send on; False: drop it.

    Attributes:
        residuals: what this rank owes as an owner.
        memory: for what is sent and received.
        scratch: for the block that is being summed.
    """

    def __init__(self, transport: Transport, *, error_feedback: bool = True) -> None:
        super().__init__(transport)
        self.residuals = OwnedResiduals(error_feedback)
        self.memory = Memory()
        self.scratch = Scratch()

    def shares(self, layout: BucketLayout) -> tuple[Share, ...]:
        """See `Channel.shares`: one for every rank. Local."""
        return share_out(layout, self.world_size)

    def start(
        self, message: torch.Tensor, sizes: Sequence[int], layouts: Sequence[BucketLayout]
    ) -> Pending:
        """See `Channel.start`. Collective: all ranks, same order."""
        self._check_message(message, sizes, layouts)
        world = self.world_size
        payloads = torch.split(message, list(sizes))
        by_owner = [payloads[owner::world] for owner in range(world)]
        row_bytes = max((sum(p.numel() for p in owned) for owned in by_owner), default=0)
        pending = _Reducing(self, by_owner, row_bytes, [self.shares(layout) for layout in layouts])
        self._wire_bytes += all_to_all_bytes(row_bytes, world)
        return pending

    def start_rows(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        """The first half, for `Pending`. Collective."""
        return self._transport.start_all_to_all(send, out)

    def start_sums(self, row: torch.Tensor, out: torch.Tensor) -> Work:
        """The second half, for `Pending`. Collective."""
        work = self._transport.start_all_gather(row, out)
        self._wire_bytes += all_gather_bytes(row.numel(), self.world_size)
        return work

    def pay(
        self, bucket: int, layout: BucketLayout, vector: torch.Tensor, scale: float = 1.0
    ) -> None:
        """See `Channel.pay`. Local."""
        self.residuals.pay(bucket, self.shares(layout)[self.rank], vector, scale)

    def settle(self, *, applied: bool) -> None:
        """See `Channel.settle`. Local."""
        self.residuals.settle(applied=applied)

    def state_dict(self) -> dict[str, Any]:
        """See `Channel.state_dict`: what this rank owes. Local."""
        return {
            "format": 1,
            "world_size": self.world_size,
            "rank": self.rank,
            "buckets": self.residuals.state_dict(),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """See `Channel.check_state`. Local."""
        for key, own in (("format", 1), ("world_size", self.world_size), ("rank", self.rank)):
            if state and state.get(key) != own:
                raise CheckpointError(
                    f"the owned residual's {key} must be {own!r}, got {state.get(key)!r}. Resume "
                    "with the release and the number of islands that saved it."
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Channel.load_state_dict`. Local."""
        self.check_state(state)
        self.residuals.load_state_dict(state["buckets"] if state else {})


class _Reducing(Pending):
    """An exchange of `OwnerReduce`; construction starts it.

    Args:
        channel: whose exchange it is.
        by_owner: for every owner, this rank's payloads of its shares, one per bucket.
        row_bytes: most bytes that any owner gets from one rank.
        shares: of every bucket.
    """

    def __init__(
        self,
        channel: OwnerReduce,
        by_owner: Sequence[Sequence[torch.Tensor]],
        row_bytes: int,
        shares: Sequence[tuple[Share, ...]],
    ) -> None:
        self._channel = channel
        self._by_owner = by_owner
        self._mine = [of_bucket[channel.rank] for of_bucket in shares]
        self._sizes = [[payload.numel() for payload in owned] for owned in by_owner]
        world = channel.world_size
        self._lent = [channel.memory.take(world * row_bytes) for _ in range(2)]
        self._lent.append(channel.memory.take(row_bytes))
        # What is sent in the first half is over when the second one receives.
        self._rows, self._received = (
            memory[: world * row_bytes].view(world, row_bytes) for memory in self._lent[:2]
        )
        self._sums = self._lent[2][:row_bytes]
        for row, owned in zip(self._rows, by_owner, strict=True):
            sizes = [payload.numel() for payload in owned]
            for slot, payload in zip(_slots(row, sizes), owned, strict=True):
                slot.copy_(payload)
            row[sum(sizes) :].zero_()
        self._first = channel.start_rows(self._rows, self._received)
        self._second: Work | None = None
        self._waited = self._finished = False
        self._left: dict[int, tuple[Share, torch.Tensor | None]] = {}

    def proceed(self) -> None:
        """See `Pending.proceed`: sum and select again as an owner. Collective."""
        if self._second is not None:
            return
        self._first.wait()
        sizes = self._sizes[self._channel.rank]
        by_rank = [_slots(row, sizes) for row in self._received]
        for bucket, out in enumerate(_slots(self._sums, sizes)):
            self._reduce(self._mine[bucket], [slots[bucket] for slots in by_rank], out)
        self._sums[sum(sizes) :].zero_()
        self._second = self._channel.start_sums(self._sums, self._rows)

    def wait(self) -> None:
        """See `Pending.wait`. Collective."""
        self.proceed()
        assert self._second is not None
        self._second.wait()
        self._waited = True

    def done(self) -> bool:
        """See `Pending.done`: never before `proceed`. Local."""
        return self._second is not None and self._second.done()

    def num_senders(self, bucket: int) -> int:
        """See `Pending.num_senders`. Local."""
        return self._channel.world_size

    def payloads(self, bucket: int) -> list[torch.Tensor]:
        """See `Pending.payloads`. Local."""
        if not self._waited or self._finished:
            raise ValueError("an exchange must have been waited for, and not be finished yet")
        return [
            _slots(row, sizes)[bucket] for row, sizes in zip(self._rows, self._sizes, strict=True)
        ]

    def sent(self, bucket: int) -> list[torch.Tensor]:
        """See `Pending.sent`. Local."""
        return [owned[bucket] for owned in self._by_owner]

    def finish(self, *, applied: bool) -> None:
        """See `Pending.finish`. Local."""
        if applied and not self._waited:
            raise ValueError("an exchange must have been waited for before it can be applied")
        if self._finished:
            return
        self._finished = True
        for number, (share, left) in self._left.items():
            self._channel.residuals.close(number, share, left if applied else None)
        if self._waited:
            for memory in self._lent:
                self._channel.memory.give(memory)

    def _reduce(self, share: Share, payloads: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Sum one share in rank order, select again, encode that, stage what is left."""
        channel = self._channel
        headers = [codec.read_header(payload) for payload in payloads]
        own = headers[channel.rank]
        _check_alike(headers, own)
        writer, layout, k = codec.CODECS[own.codec_id], share.layout, own.k
        total = channel.residuals.open(own.bucket, share)
        self._left[own.bucket] = (share, None)
        nonfinite = any(header.signals.nonfinite for header in headers)
        if not nonfinite:
            for header, payload in zip(headers, payloads, strict=True):
                block = channel.scratch.block(layout, k)
                scatter_add(total, writer.read_body(header, payload, layout, out=block))
        block = select(total, layout, k, out=channel.scratch.block(layout, k))
        nonfinite = nonfinite or not block.is_finite()
        writer.encode(
            block,
            step=own.step,
            bucket=own.bucket,
            rank=channel.rank,
            signals=dataclasses.replace(own.signals, nonfinite=nonfinite),
            out=out,
        )
        if not nonfinite:
            written = writer.read_body(codec.read_header(out), out, layout, out=block, checked=True)
            scatter_add(total, written, -1.0)
            self._left[own.bucket] = (share, total)


def _slots(row: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """The payloads that lie one after the other from the beginning of a row."""
    return torch.split(row[: sum(sizes)], list(sizes))


def _check_alike(headers: Sequence[codec.Header], own: codec.Header) -> None:
    """All payloads of a share must be of one step, bucket, k and codec, in their ranks' places."""
    for place, header in enumerate(headers):
        for name in ("step", "bucket", "k", "codec_id"):
            theirs, ours = getattr(header, name), getattr(own, name)
            if theirs != ours:
                raise RankMismatchError(
                    f"payloads must be of one exchange, but {name} is {theirs} on rank {place} and "
                    f"{ours} on rank {own.rank}"
                )
        if header.rank != place:
            raise RankMismatchError(
                f"a payload of rank {header.rank} came from the place of rank {place}"
            )
