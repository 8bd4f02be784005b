"""A bucket cut into shares, one for each rank that owns one: which rows, which dense elements.

The pruned rows of a bucket are dealt out in contiguous equal shares, and so are its dense elements.
A share has a layout of its own in which the pruned pieces come first. No row is cut, so selecting
in every share keeps what selecting in the bucket keeps, and a share of a `SparseBlock` is a slice
of its tensors. Ownership follows from the layout alone: it does not change with k.

All functions are local.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.bucket.layout import CHUNK_NUMEL, BucketLayout, lay_out


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive elements of a bucket that lie consecutively in a share too.

    Attributes:
        bucket_start: first element, counted from the start of the bucket.
        share_start: first element, counted from the start of the share.
        numel: number of elements.
    """

    bucket_start: int
    share_start: int
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one rank owns of a bucket.

    Attributes:
        layout: of the owned elements.
        pieces: where they lie in the bucket, in the share's order.
        before: layouts of the shares before this one.
    """

    layout: BucketLayout
    pieces: tuple[Piece, ...]
    before: tuple[BucketLayout, ...]

    def of(self, block: SparseBlock) -> SparseBlock:
        """This share of a block of the whole bucket.

        Args:
            block: of the layout that was cut.

        Returns:
            A block of `layout` in views of the tensors of `block`.
        """
        if block.layout is self.layout:
            return block
        kept_start = sum(layout.num_kept(block.k) for layout in self.before)
        kept = slice(kept_start, kept_start + self.layout.num_kept(block.k))
        dense_start = sum(layout.dense_numel for layout in self.before)
        dense = slice(dense_start, dense_start + self.layout.dense_numel)
        return SparseBlock(
            self.layout, block.k, block.indices[kept], block.values[kept], block.dense[dense]
        )


def whole(layout: BucketLayout) -> tuple[Share, ...]:
    """The bucket as one share of the same layout."""
    return layout.derived(
        ("whole",),
        lambda: (Share(layout, (Piece(0, 0, layout.numel),) if layout.numel else (), ()),),
    )


def share_out(layout: BucketLayout, count: int) -> tuple[Share, ...]:
    """Cut a bucket into shares.

    Args:
        layout: of the bucket.
        count: number of shares, >= 1.

    Returns:
        The shares in order; some are empty where the bucket has fewer rows or elements than that.
        The same objects at every call, as long as the layout keeps them.
    """
    return layout.derived(("shares", count), lambda: _share_out(layout, count))


def _share_out(layout: BucketLayout, count: int) -> tuple[Share, ...]:
    rows = [(start, numel) for start, numel in _rows(layout)]
    shares: list[Share] = []
    for index in range(count):
        first, last = (len(rows) * i // count for i in (index, index + 1))
        low, high = (layout.dense_numel * i // count for i in (index, index + 1))
        pruned = _joined(layout, rows[first:last])
        dense = list(_dense_between(layout, low, high))
        own = lay_out(
            [numel for _, numel in pruned + dense], [True] * len(pruned) + [False] * len(dense)
        )
        pieces = tuple(
            Piece(start, segment.offset, numel)
            for (start, numel), segment in zip(pruned + dense, own.segments, strict=True)
        )
        shares.append(Share(own, pieces, tuple(share.layout for share in shares)))
    return tuple(shares)


def _rows(layout: BucketLayout) -> Iterator[tuple[int, int]]:
    """First element and size of every pruned row."""
    for segment in layout.segments:
        if segment.pruned:
            for start in range(0, segment.numel, CHUNK_NUMEL):
                yield segment.offset + start, min(CHUNK_NUMEL, segment.numel - start)


def _joined(layout: BucketLayout, rows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Rows that follow each other in one segment as one piece each."""
    borders = {segment.offset for segment in layout.segments}
    pieces: list[tuple[int, int]] = []
    for start, numel in rows:
        if pieces and sum(pieces[-1]) == start and start not in borders:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + numel)
        else:
            pieces.append((start, numel))
    return pieces


def _dense_between(layout: BucketLayout, low: int, high: int) -> Iterator[tuple[int, int]]:
    """The dense elements low .. high - 1, counted among the dense ones, as pieces of the bucket."""
    done = 0
    for start, numel in layout.dense_runs:
        first, last = max(low, done), min(high, done + numel)
        if first < last:
            yield start + first - done, last - first
        done += numel
