"""`AllGather`: every rank hands its payloads to every other.

Exact, one latency. Its traffic grows with the number of ranks, so it is meant for up to 8 islands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_gradprune.bucket.layout import BucketLayout
from ds_gradprune.wire.channel import Channel, Pending
from ds_gradprune.wire.memory import Memory
from ds_gradprune.wire.shares import Share, whole
from ds_gradprune.wire.traffic import all_gather_bytes
from ds_gradprune.wire.transport import Transport, Work

MOST_BYTES = 256 * 2**20
"""A message that is longer travels in several collectives, cut between payloads."""


class AllGather(Channel):
    """All payloads to all ranks.

    Args:
        transport: this rank's end of the group; closed with the channel.
        most_bytes: see `MOST_BYTES`.
    """

    def __init__(self, transport: Transport, most_bytes: int = MOST_BYTES) -> None:
        super().__init__(transport)
        self._most_bytes = most_bytes
        self._memory = Memory()

    def shares(self, layout: BucketLayout) -> tuple[Share, ...]:
        """See `Channel.shares`: the bucket itself. Local."""
        return whole(layout)

    def start(
        self, message: torch.Tensor, sizes: Sequence[int], layouts: Sequence[BucketLayout]
    ) -> Pending:
        """See `Channel.start`. Collective: all ranks, same order."""
        self._check_message(message, sizes, layouts)
        world_size = self.world_size
        memory = self._memory.take(world_size * message.numel())
        works: list[Work] = []
        rows: list[tuple[Work, tuple[torch.Tensor, ...]]] = []
        start = 0
        for together in _cut(sizes, self._most_bytes):
            stop = start + sum(together)
            out = memory[world_size * start : world_size * stop].view(world_size, stop - start)
            work = self._transport.start_all_gather(message[start:stop], out)
            works.append(work)
            split = zip(*(torch.split(row, together) for row in out), strict=True)
            rows += [(work, payloads) for payloads in split]
            start = stop
        self._wire_bytes += all_gather_bytes(message.numel(), world_size)
        sent = torch.split(message, list(sizes))
        return _Gathered(self.rank, works, rows, sent, self._memory, memory)


class _Gathered(Pending):
    """An exchange of `AllGather`.

    Args:
        rank: this one.
        works: its collectives.
        rows: of every bucket: the collective it travels in, and the ranks' payloads.
        sent: of every bucket: the own payload.
        pool: where the receive memory goes when all is over.
        memory: the receive memory.
    """

    def __init__(
        self,
        rank: int,
        works: Sequence[Work],
        rows: Sequence[tuple[Work, tuple[torch.Tensor, ...]]],
        sent: Sequence[torch.Tensor],
        pool: Memory,
        memory: torch.Tensor,
    ) -> None:
        self._rank = rank
        self._works = works
        self._rows = rows
        self._sent = sent
        self._pool = pool
        self._memory = memory
        self._waited = self._finished = False

    def wait(self) -> None:
        """See `Pending.wait`. Collective."""
        for work in self._works:
            work.wait()
        self._waited = True

    def done(self) -> bool:
        """See `Pending.done`. Local."""
        return all(work.done() for work in self._works)

    def payloads(self, bucket: int) -> list[torch.Tensor]:
        """See `Pending.payloads`. Local."""
        if not self._waited or self._finished:
            raise ValueError("an exchange must have been waited for, and not be finished yet")
        work, payloads = self._rows[bucket]
        return list(payloads if work.took_part is None else payloads[: len(work.took_part)])

    def num_senders(self, bucket: int) -> int:
        """See `Pending.num_senders`. Local."""
        work, payloads = self._rows[bucket]
        return len(payloads if work.took_part is None else work.took_part)

    def place(self, bucket: int) -> int:
        """See `Pending.place`. Local."""
        took_part = self._rows[bucket][0].took_part
        return self._rank if took_part is None else took_part.index(self._rank)

    def sent(self, bucket: int) -> list[torch.Tensor]:
        """See `Pending.sent`. Local."""
        return [self._sent[bucket]]

    def finish(self, *, applied: bool) -> None:
        """See `Pending.finish`. Local."""
        if applied and not self._waited:
            raise ValueError("an exchange must have been waited for before it can be applied")
        if self._waited and not self._finished:
            self._pool.give(self._memory)
        self._finished = True


def _cut(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Sizes in groups that sum to `most` at most; one that is larger is a group of its own."""
    groups: list[list[int]] = []
    total = 0
    for size in sizes:
        if not groups or total + size > most:
            groups.append([])
            total = 0
        groups[-1].append(size)
        total += size
    return groups
