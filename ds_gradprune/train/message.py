"""The message of one exchange: the payloads of all its buckets, written and verified.

Used by both modes. A message is complete before it leaves, and everything that arrives is verified
before anything is applied. Scratch memory is one block, whatever the number of buckets and ranks.
All functions are local.

Longer than 300 lines: what is written and what is read of a message belong together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from ds_gradprune import codec
from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.bucket.layout import CHUNK_NUMEL, BucketLayout
from ds_gradprune.bucket.select import select
from ds_gradprune.errors import RankMismatchError
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.scratch import Memory as Memory
from ds_gradprune.wire.channel import Channel, Pending
from ds_gradprune.wire.shares import Share


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """What is selected from in one bucket: vector + plus_scale * plus + more_scale * more.

    Attributes:
        layout: what lies where.
        vector: (numel,), or one 1-D fp32 tensor per segment.
        plus: (numel,) fp32; None: nothing is added.
        plus_scale: its factor.
        more: (numel,) fp32; None: nothing is added.
        more_scale: its factor.
    """

    layout: BucketLayout
    vector: torch.Tensor | Sequence[torch.Tensor]
    plus: torch.Tensor | None = None
    plus_scale: float = 1.0
    more: torch.Tensor | None = None
    more_scale: float = 1.0

    @property
    def device(self) -> torch.device:
        """Where the bucket lives."""
        first = self.vector if isinstance(self.vector, torch.Tensor) else self.vector[0]
        return first.device


@dataclasses.dataclass(frozen=True, slots=True)
class Stamp:
    """What all payloads of a message say alike.

    Attributes:
        step: optimizer step, counted from 1.
        rank: the sender.
        k: kept elements per chunk.
        signals: what the sender measured.
        first_bucket: number of the message's first bucket inside the step.
    """

    step: int
    rank: int
    k: int
    signals: RankSignals
    first_bucket: int = 0


AT_ONCE_BYTES = 4 * 2**20
"""All deliveries of a bucket are decoded at once where they take no more: one pass over the weights
instead of one per delivery. Beyond, one after the other, so that memory is flat in the ranks."""
DEVICE_AT_ONCE_BYTES = 64 * 2**20
"""The same on an accelerator, whose buckets are larger."""


class Message:
    """The payloads of all buckets of one exchange, as one rank sends them.

    Args:
        sources: one per bucket.
        stamp: what the headers say. A payload whose values hold inf or nan says so.
        value_bits: bits of a value on the wire.
        channel: says in which shares a bucket travels.
        memory: where the message comes to lie.
        number: of the message among those that are under way together.

    Attributes:
        sizes: bytes of every payload; equal on all ranks.
        layouts: of the buckets.
        stamp: see there.
        is_finite: what was written holds no inf and no nan; True before `write`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        stamp: Stamp,
        value_bits: int,
        channel: Channel,
        memory: Memory,
        number: int = 0,
    ) -> None:
        self._number = number
        self.layouts = [source.layout for source in sources]
        self.stamp = stamp
        self.is_finite = True
        self._sources = sources
        self._channel = channel
        self._memory = memory
        self._writer = codec.codec_for(stamp.k, value_bits)
        self._shares = [channel.shares(layout) for layout in self.layouts]
        self.sizes = [
            self._writer.payload_bytes(share.layout, stamp.k)
            for shares in self._shares
            for share in shares
        ]

    @torch.no_grad()
    def write(self) -> torch.Tensor:
        """Select and encode every bucket.

        Returns:
            (sum of sizes,) uint8, CPU.
        """
        message = self._memory.message(sum(self.sizes), self._number)
        payloads = iter(torch.split(message, self.sizes))
        for number, (source, shares) in enumerate(zip(self._sources, self._shares, strict=True)):
            self._write_bucket(number, source, shares, payloads)
        self._sources = ()  # their memory is not needed any more
        self._written = message
        return message

    def sent(self, number: int, device: torch.device) -> SparseBlock:
        """What this rank sends of a bucket, exactly as every receiver reads it; after `write`.

        Args:
            number: of the bucket.
            device: where the block comes to lie, in scratch memory that the next one uses again.
        """
        before = sum(len(shares) for shares in self._shares[:number])
        shares = self._shares[number]
        payloads = torch.split(self._written, self.sizes)[before : before + len(shares)]
        block = self._memory.block(self.layouts[number], self.stamp.k, device)
        return _read(block, shares, payloads, [codec.read_header(p) for p in payloads])

    def _write_bucket(
        self,
        number: int,
        source: Source,
        shares: Sequence[Share],
        payloads: Iterator[torch.Tensor],
    ) -> None:
        stamp = self.stamp
        block = select(
            source.vector,
            source.layout,
            stamp.k,
            plus=source.plus,
            plus_scale=source.plus_scale,
            more=source.more,
            more_scale=source.more_scale,
            out=self._memory.block(source.layout, stamp.k, source.device),
        )
        signals = stamp.signals
        if not block.is_finite():  # inf and nan are the largest magnitudes: they were selected
            signals = dataclasses.replace(signals, nonfinite=True)
            self.is_finite = False
        for share, payload in zip(shares, payloads, strict=False):
            self._writer.encode(
                share.of(block),
                step=stamp.step,
                bucket=stamp.first_bucket + number,
                rank=stamp.rank,
                signals=signals,
                out=payload,
            )

    def arrived(self, pending: Pending) -> Arrived:
        """Everything that has come, verified.

        Args:
            pending: the exchange of this message, waited for.

        Raises:
            WireFormatError: a payload is damaged.
            RankMismatchError: a payload is of another step, bucket or k.
        """
        return Arrived(pending, self.layouts, self._shares, self.stamp, self._memory)


class Arrived:
    """What all ranks sent in one exchange; made by `Message.arrived`.

    Attributes:
        num_buckets: that the message holds.
        nonfinite: ranks whose values hold inf or nan.
        factors: by how much each delivery is scaled; empty: by nothing. See `clip`.
    """

    def __init__(
        self,
        pending: Pending,
        layouts: Sequence[BucketLayout],
        shares: Sequence[Sequence[Share]],
        stamp: Stamp,
        memory: Memory,
    ) -> None:
        self.num_buckets = len(layouts)
        self._pending = pending
        self._layouts = layouts
        self._shares = shares
        self._stamp = stamp
        self._memory = memory
        self.factors: list[float] = []
        self._headers: list[list[codec.Header]] = []
        bad: set[int] = set()
        for number, parts in enumerate(shares):
            self._headers.append([])
            for index, payload in enumerate(pending.payloads(number)):
                header = codec.read_header(payload)
                _expect(header, stamp, stamp.first_bucket + number)
                if header.signals.nonfinite:
                    bad.add(header.rank)
                else:
                    layout = parts[index % len(parts)].layout
                    codec.CODECS[header.codec_id].check(header, payload, layout)
                self._headers[-1].append(header)
        self.nonfinite = sorted(bad)

    def deliveries(self, number: int, device: torch.device) -> Iterator[tuple[SparseBlock, bool]]:
        """What the vector of a bucket takes, in an order that is the same on all ranks.

        Yields:
            A block, which holds until the next one, and whether it is just what this rank sent.
        """
        payloads, count = self._pending.payloads(number), len(self._shares[number])
        place = self._pending.place(number) if count == 1 else None
        for delivery, first in enumerate(range(0, len(payloads), count)):
            here = slice(first, first + count)
            block = self._read(number, payloads[here], self._headers[number][here], device)
            yield block, delivery == place

    def num_senders(self, number: int) -> int:
        """Ranks whose parts a bucket's deliveries hold; all buckets may not have the same."""
        return self._pending.num_senders(number)

    def place(self, number: int) -> int:
        """Which delivery of a bucket this rank has sent, where there is one per rank."""
        return self._pending.place(number)

    def factor(self, delivery: int) -> float:
        """By how much a delivery is scaled."""
        return self.factors[delivery] if self.factors else 1.0

    def all_at_once(self, number: int, device: torch.device) -> list[SparseBlock] | None:
        """What every rank sent of a bucket, in rank order; None where that is too much memory."""
        payloads, layout = self._pending.payloads(number), self._layouts[number]
        block_bytes = 6 * layout.num_kept(self._stamp.k) + 4 * layout.dense_numel
        most_bytes = AT_ONCE_BYTES if device.type == "cpu" else DEVICE_AT_ONCE_BYTES
        if len(self._shares[number]) > 1 or len(payloads) * block_bytes > most_bytes:
            return None
        headers = self._headers[number]
        return [
            self._read(number, [payload], [header], device, place)
            for place, (payload, header) in enumerate(zip(payloads, headers, strict=True))
        ]

    def sent(self, number: int, device: torch.device) -> SparseBlock | None:
        """What this rank sent of a bucket; None where `deliveries` yields it anyway."""
        if len(self._shares[number]) == 1:
            return None
        payloads = self._pending.sent(number)
        return self._read(number, payloads, [codec.read_header(p) for p in payloads], device)

    def finish(self, *, applied: bool) -> None:
        """Memory goes back; the deliveries were applied, or not, on all ranks."""
        self._pending.finish(applied=applied)

    def _read(
        self,
        number: int,
        payloads: Sequence[torch.Tensor],
        headers: Sequence[codec.Header],
        device: torch.device,
        place: int = 0,
    ) -> SparseBlock:
        block = self._memory.block(self._layouts[number], self._stamp.k, device, place)
        return _read(block, self._shares[number], payloads, headers)


def _read(
    block: SparseBlock,
    shares: Sequence[Share],
    payloads: Sequence[torch.Tensor],
    headers: Sequence[codec.Header],
) -> SparseBlock:
    """One block of the whole bucket out of the payloads of its shares, which were checked."""
    for share, payload, header in zip(shares, payloads, headers, strict=True):
        reader = codec.CODECS[header.codec_id]
        reader.read_body(header, payload, share.layout, out=share.of(block), checked=True)
    return block


def _expect(header: codec.Header, stamp: Stamp, bucket: int) -> None:
    found = (header.step, header.bucket, header.k)
    if found != (stamp.step, bucket, stamp.k):
        raise RankMismatchError(
            f"a payload must be of step {stamp.step}, bucket {bucket}, k {stamp.k} of "
            f"{CHUNK_NUMEL}, got step {found[0]}, bucket {found[1]}, k {found[2]} from rank "
            f"{header.rank}. Restart from the last checkpoint; if it happens again, compare "
            "versions and configuration of the hosts."
        )
