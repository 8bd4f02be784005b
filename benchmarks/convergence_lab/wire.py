"""What all workers owe, pruned, written to payloads, read back and summed, all in one call.

The steps are those of `ds_gradprune.reducer`, in its order and with its functions, called for one
worker after the other instead of in threads; a test shows that both give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.convergence_lab.grid import Sent
from benchmarks.convergence_lab.values import GROUP_NUMEL, rounded, values_bytes
from ds_gradprune import codec, sparsify
from ds_gradprune.codec.base import HEADER_BYTES
from ds_gradprune.records import CHUNK_NUMEL, BucketLayout, RankSignals, Segment, SparseBlock

_SILENT = RankSignals(
    loss=None,
    nonfinite=False,
    compute_time_s=None,
    codec_time_s=0.0,
    comm_time_s=0.0,
    wire_bytes=0,
    agreement=0,
)


@dataclass(frozen=True, slots=True)
class Message:
    """What one worker sends.

    Attributes:
        positions: (n,) int64, distinct.
        values: (n,) float32, as every receiver decodes them.
        payload_bytes: size on the wire.
    """

    positions: torch.Tensor
    values: torch.Tensor
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Swap:
    """Outcome of an exchange.

    Attributes:
        total: (numel,) sum over workers, added in their order.
        received_bits: per worker.
        spread: root mean square of the workers' messages over that of their mean; sqrt(workers) if
            they are unrelated, 1 if they agree. Means something where all sent the same places.
    """

    total: torch.Tensor
    received_bits: float
    spread: float


def lab_layout(shapes: list[torch.Size], prune_vectors: bool) -> BucketLayout:
    """The layout that the plug-in would make, or one in which vectors are pruned too."""
    layout = sparsify.layout_of(shapes, min_numel=CHUNK_NUMEL)
    if not prune_vectors:
        return layout
    segments = tuple(Segment(s.offset, s.numel, pruned=True) for s in layout.segments)
    return BucketLayout(segments, layout.numel)


def is_real(sent: Sent) -> bool:
    """The codec writes what is sent; else values, or places known to all, are simulated."""
    if sent.pick != "top_k":
        return False
    try:
        codec.codec_for(1, sent.value_bits)
    except ValueError:  # this codec has no values of that width
        return False
    return True


class Wire:
    """One bucket of all workers.

    Args:
        layout: what lies where.
        sent: how much is sent and how.
    """

    def __init__(self, layout: BucketLayout, sent: Sent) -> None:
        self._layout = layout
        self._sent = sent
        self._dense = sparsify.dense_positions(layout)
        self._begin = 0
        self._owners_owe = torch.zeros(layout.numel)
        if sent.pick != "top_k":
            self._order = self._rotation()

    def swap(self, owed: torch.Tensor, density: float, score: torch.Tensor | None = None) -> Swap:
        """Send the chosen part of every row and take it off that row.

        Args:
            owed: (workers, numel) float32, changed in place.
            density: kept / all in pruned segments.
            score: (numel,) factor of the magnitudes when they are compared; None: 1.
        """
        places = None if self._sent.pick == "top_k" else self._next(density)
        total = torch.zeros(owed.shape[1])
        payload_bytes, squares = 0.0, 0.0
        for row in owed:
            message = self._take(row, places, density, score)
            total.index_add_(0, message.positions, message.values)
            payload_bytes += message.payload_bytes
            squares += float(message.values.norm()) ** 2
        workers = len(owed)
        mean_norm = float(total.norm()) / workers
        spread = (squares / workers) ** 0.5 / mean_norm if mean_norm > 0.0 else 1.0
        if self._sent.exchange == "all_gather":
            return Swap(total, 8.0 * payload_bytes * (workers - 1) / workers, spread)
        self._owners_owe += total
        message = self._take(self._owners_owe, places, density, score)
        total = torch.zeros_like(total).index_add_(0, message.positions, message.values)
        both_ways = payload_bytes / workers + message.payload_bytes
        return Swap(total, 8.0 * both_ways * (workers - 1) / workers, spread)

    def _take(
        self,
        row: torch.Tensor,
        places: torch.Tensor | None,
        density: float,
        score: torch.Tensor | None,
    ) -> Message:
        """What is sent of one row, which no longer owes it."""
        if places is None:
            message = self._top_k(row, density, score)
        else:
            message = self._pack(row, places, places_bytes=0)
        row.index_add_(0, message.positions, message.values, alpha=-1.0)
        return message

    def _top_k(self, row: torch.Tensor, density: float, score: torch.Tensor | None) -> Message:
        k = max(1, round(density * CHUNK_NUMEL))
        block = sparsify.select(row if score is None else row * score, self._layout, k)
        positions = sparsify.kept_positions(self._layout, k, block.indices)
        if score is not None:
            block = SparseBlock(self._layout, k, block.indices, row[positions], row[self._dense])
        if not is_real(self._sent):
            kept = len(positions)
            index_bytes = 0 if k == CHUNK_NUMEL else 3 * ((kept + 1) // 2)
            return self._pack(row, positions, places_bytes=index_bytes)
        writer = codec.codec_for(k, self._sent.value_bits)
        payload = writer.encode(block, step=1, bucket=0, rank=0, signals=_SILENT)
        _, read = codec.decode(payload, self._layout)
        return Message(
            torch.cat((sparsify.kept_positions(self._layout, k, read.indices), self._dense)),
            torch.cat((read.values, read.dense)),
            payload.numel(),
        )

    def _pack(self, row: torch.Tensor, positions: torch.Tensor, places_bytes: int) -> Message:
        """Values of 1, 2 or 4 bits, and places known to all: simulated, sizes as in the codec."""
        bits = self._sent.value_bits
        positions = torch.cat((positions, self._dense))
        values = row[positions]
        if bits < 16:
            values = rounded(values, bits)
        elif bits == 16:
            values = values.bfloat16().float()
        body = values_bytes(len(positions), bits) + places_bytes
        return Message(positions, values, HEADER_BYTES + body + -body % 4)

    def _rotation(self) -> torch.Tensor:
        """Positions of all pruned elements in the order in which they are sent."""
        pruned = torch.ones(self._layout.numel, dtype=torch.bool)
        pruned[self._dense] = False
        order = pruned.nonzero().view(-1)
        if self._sent.pick == "random":
            groups = list(order.split(GROUP_NUMEL))
            shuffled = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
            order = torch.cat([groups[int(i)] for i in shuffled])
        return order

    def _next(self, density: float) -> torch.Tensor:
        """The next run of the rotation; it wraps around."""
        numel = len(self._order)
        count = min(numel, max(1, round(density * numel)))
        begin, self._begin = self._begin, (self._begin + count) % numel
        tail = self._order[begin : begin + count]
        return torch.cat((tail, self._order[: count - len(tail)]))
