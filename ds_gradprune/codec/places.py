"""Where the kept elements of a row lie, in the fewest bits. Local functions only.

A row of n elements keeps m of them. What that takes is a function of n and m alone, so every rank
knows the size and the code without being told. The cheapest of these is used, the first if equal:

* nothing, if m = n;
* plain: every index in b bits, b the fewest that hold n - 1: m * b bits;
* bitmap: one bit per element: n bits;
* Elias-Fano: the lowest l bits of every index as they are, and what is above them as a run of bits:
  for every index in order as many zeros as its upper part is larger than the one before, then a
  one: m * l + m + (n - 1 >> l) bits, with the l in 1 .. b - 1 that makes it least.

For full chunks that is plain up to k = 3, Elias-Fano up to 1024, a bitmap above.

References:
    P. Elias: Efficient storage and retrieval by content and address of static files. Journal of the
    ACM 21, 1974. R. M. Fano: On the number of bits required to implement an associative memory.
    MIT, 1971.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ds_gradprune.bucket.dispatch import threads
from ds_gradprune.bucket.layout import BucketLayout, Run
from ds_gradprune.codec.header import Bytes
from ds_gradprune.codec.place_code import PlaceCode, code_of
from ds_gradprune.native import library
from ds_gradprune.native.library import Longs, Shorts


@dataclass(frozen=True, slots=True)
class Group:
    """All rows of one shape, wherever they lie in the bucket.

    Attributes:
        code: how their indices are written.
        runs: the rows, in the bucket's order.
        num_rows: their number.
    """

    code: PlaceCode
    runs: tuple[Run, ...]
    num_rows: int

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.code.nbytes(self.num_rows)

    def blocks(self) -> Iterator[tuple[int, list[Run]]]:
        """Rows to be worked on together: the number of the first, and where they lie."""
        first, parts, room = 0, [], self.code.block_rows
        for run in self.runs:
            start = 0
            while start < run.num_rows:
                stop = min(run.num_rows, start + room)
                parts.append(run.rows(start, stop))
                room -= stop - start
                start = stop
                if not room:
                    yield first, parts
                    first, parts, room = first + self.code.block_rows, [], self.code.block_rows
        if parts:
            yield first, parts


def groups(layout: BucketLayout, k: int) -> tuple[Group, ...]:
    """Rows by their shape, in the order in which shapes first occur; kept with the layout.

    Raises:
        ValueError: k is outside 1 .. CHUNK_NUMEL.
    """
    return layout.derived(("groups", k), lambda: _groups(layout, k))


def places_bytes(layout: BucketLayout, k: int) -> int:
    """Bytes of all indices of a block."""
    return sum(group.nbytes for group in groups(layout, k))


def write_places(layout: BucketLayout, k: int, indices: Shorts, out: Bytes) -> None:
    """Fill `out`, (places_bytes,), from (num_kept,) indices, shape of row after shape of row.

    Raises:
        ValueError: an index is outside its row, or they do not rise.
    """
    native = library.kernels()
    if native is None or native.write_places(_table(layout, k), indices, out, threads()):
        reference_write(layout, k, indices, out)


def read_places(layout: BucketLayout, k: int, data: Bytes, indices: Shorts) -> None:
    """Fill (num_kept,) `indices` from (places_bytes,) bytes.

    Args:
        layout: the bucket's layout.
        k: kept elements per full row.
        data: arbitrary bytes.
        indices: overwritten; after an error with anything.

    Raises:
        WireFormatError: these are no indices of such a block.
    """
    native = library.kernels()
    if native is None or native.read_places(_table(layout, k), data, indices, threads()):
        reference_read(layout, k, data, indices)


def check_places(layout: BucketLayout, k: int, data: Bytes) -> None:
    """Find everything that `read_places` may find; nothing is kept.

    Raises:
        WireFormatError: as `read_places`.
    """
    native = library.kernels()
    if native is None or native.check_places(_table(layout, k), data, threads()):
        reference_read(layout, k, data, None)


def reference_write(layout: BucketLayout, k: int, indices: Shorts, out: Bytes) -> None:
    """`write_places` in numpy; also has the words for what the kernels find."""
    for group in groups(layout, k):
        for first, parts in group.blocks():
            tables = [_rows(indices, run) for run in parts]
            rows = tables[0] if len(tables) == 1 else np.concatenate(tables)
            group.code.write(first, rows, group.num_rows, out[: group.nbytes])
        out = out[group.nbytes :]


def reference_read(layout: BucketLayout, k: int, data: Bytes, indices: Shorts | None) -> None:
    """`read_places` in numpy; None: as `check_places`."""
    for group in groups(layout, k):
        for first, parts in group.blocks():
            count = sum(run.num_rows for run in parts)
            rows = np.empty((count, group.code.row_kept), dtype=np.int16)
            group.code.read(first, rows, group.num_rows, data[: group.nbytes])
            if indices is not None:
                for run in parts:
                    _rows(indices, run)[:] = rows[: run.num_rows]
                    rows = rows[run.num_rows :]
        data = data[group.nbytes :]


def _groups(layout: BucketLayout, k: int) -> tuple[Group, ...]:
    shapes: dict[tuple[int, int], list[Run]] = {}
    for run in layout.runs(k):
        shapes.setdefault((run.row_numel, run.row_kept), []).append(run)
    return tuple(
        Group(code_of(*shape), tuple(same), sum(run.num_rows for run in same))
        for shape, same in shapes.items()
    )


def _table(layout: BucketLayout, k: int) -> Longs:
    """The kernels' table of places, kept with the layout."""
    return layout.derived(
        ("places table", k),
        lambda: library.places_table((group.code, group.runs) for group in groups(layout, k)),
    )


def _rows(indices: Shorts, run: Run) -> Shorts:
    """The run's part of all kept elements, a view of (num_rows, row_kept)."""
    return indices[run.kept_start : run.kept_stop].reshape(run.num_rows, run.row_kept)
