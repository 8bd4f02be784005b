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

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ds_gradprune.codec.base import Bytes
from ds_gradprune.codec.bits import pack, packed_bytes, unpack
from ds_gradprune.errors import WireFormatError
from ds_gradprune.records import BucketLayout
from ds_gradprune.rows import Run, runs

_BLOCK_BITS = 1 << 19
"""About so many bits are written or read at a time, so that nothing as large as a model is made."""


@dataclass(frozen=True, slots=True)
class PlaceCode:
    """How the kept indices of rows of one shape are written.

    Attributes:
        row_numel: elements per row, n.
        row_kept: elements kept per row, m.
        low_bits: bits of every index that are written as they are.
        row_bits: bits per row of what is above them: bits of which every kept element sets one.
        run_length: True: Elias-Fano; False: plain (row_bits is 0), a bitmap or nothing.
    """

    row_numel: int
    row_kept: int
    low_bits: int
    row_bits: int
    run_length: bool

    @property
    def bits_per_row(self) -> int:
        """What one row takes."""
        return self.row_kept * self.low_bits + self.row_bits

    def low_bytes(self, num_rows: int) -> int:
        """Bytes of the lower parts of so many rows."""
        return packed_bytes(num_rows * self.row_kept, self.low_bits)

    def nbytes(self, num_rows: int) -> int:
        """Bytes of so many rows."""
        return self.low_bytes(num_rows) + -(-num_rows * self.row_bits // 8)

    def write(self, table: npt.NDArray[np.int16], out: Bytes) -> None:
        """Fill `out`, (nbytes,), with the indices of (num_rows, row_kept).

        Raises:
            ValueError: an index is outside its row, or they do not rise.
        """
        split = self.low_bytes(len(table))
        for start in range(0, len(table), self._block_rows):
            rows = table[start : start + self._block_rows]
            fault = _fault(rows, self.row_numel)
            if fault:
                raise ValueError(f"block's {fault}")
            low, high = self._block(start, len(rows))
            pack(rows.reshape(-1), self.low_bits, out[:split][low])
            if self.row_bits:
                flags = np.zeros(-(-len(rows) * self.row_bits // 8) * 8, dtype=np.bool_)
                flags[(self._origins(len(rows)) + (rows >> self.low_bits)).reshape(-1)] = True
                out[split:][high] = np.packbits(flags, bitorder="little")

    def read(self, data: Bytes, table: npt.NDArray[np.int16]) -> None:
        """Fill (num_rows, row_kept) `table` from what `write` made.

        Args:
            data: (nbytes,), arbitrary.
            table: overwritten; after an error with anything.

        Raises:
            WireFormatError: these are no indices of such rows.
        """
        if self.row_kept == self.row_numel:
            table[:] = np.arange(self.row_numel, dtype=np.int16)
            return
        split = self.low_bytes(len(table))
        for start in range(0, len(table), self._block_rows):
            rows = table[start : start + self._block_rows]
            low, high = self._block(start, len(rows))
            rows[:] = unpack(data[:split][low], rows.size, self.low_bits).reshape(rows.shape)
            if self.row_bits:
                self._add_upper(data[split:][high], rows)
            fault = _fault(rows, self.row_numel)
            if fault:
                raise WireFormatError(f"payload's {fault}")

    def _add_upper(self, data: Bytes, rows: npt.NDArray[np.int16]) -> None:
        """Add the upper parts that the set bits of `data` stand for."""
        found = np.flatnonzero(np.unpackbits(data, bitorder="little").view(np.bool_))
        if len(found) != rows.size:
            raise WireFormatError(
                f"payload must set {rows.size} bits in the upper parts of {len(rows)} rows, got "
                f"{len(found)}."
            )
        upper = found.reshape(rows.shape) - self._origins(len(rows))
        # The bits rise, so the ends of a row speak for it.
        highest = (self.row_numel - 1) >> self.low_bits
        if (upper[:, 0] < 0).any() or (upper[:, -1] > highest).any():
            raise WireFormatError(f"payload must set {self.row_kept} bits in every row.")
        rows |= (upper << self.low_bits).astype(np.int16)

    @property
    def _block_rows(self) -> int:
        """Rows worked on at a time: a multiple of 8, so every block begins with a whole byte."""
        return max(8, _BLOCK_BITS // (8 * self.row_kept + self.row_bits) // 8 * 8)

    def _block(self, start: int, num_rows: int) -> tuple[slice, slice]:
        """Where rows start .. start + num_rows - 1 lie in the lower and in the upper parts."""
        stop = start + num_rows
        low = slice(self.low_bytes(start), self.low_bytes(stop))
        return low, slice(start * self.row_bits // 8, -(-stop * self.row_bits // 8))

    def _origins(self, num_rows: int) -> npt.NDArray[np.intp]:
        """(num_rows, row_kept or 1): the bit that an element with upper part 0 sets."""
        origins: npt.NDArray[np.intp] = _rising(num_rows)[:, None] * self.row_bits
        return origins + _rising(self.row_kept) if self.run_length else origins


@dataclass(frozen=True, slots=True)
class _Group:
    """All rows of one shape, wherever they lie in the bucket."""

    code: PlaceCode
    runs: tuple[Run, ...]
    num_rows: int


@functools.lru_cache(maxsize=256)
def code_of(row_numel: int, row_kept: int) -> PlaceCode:
    """The cheapest code for such rows, 1 <= row_kept <= row_numel <= 4096."""
    n, m = row_numel, row_kept
    if m == n:
        return PlaceCode(n, m, 0, 0, run_length=False)
    width = (n - 1).bit_length()
    codes = [PlaceCode(n, m, width, 0, run_length=False), PlaceCode(n, m, 0, n, run_length=False)]
    for low_bits in range(width - 1, 0, -1):
        codes.append(PlaceCode(n, m, low_bits, m + ((n - 1) >> low_bits), run_length=True))
    return min(codes, key=lambda code: code.bits_per_row)


def places_bytes(layout: BucketLayout, k: int) -> int:
    """Bytes of all indices of a block."""
    return sum(group.code.nbytes(group.num_rows) for group in _groups(layout, k))


def write_places(layout: BucketLayout, k: int, indices: npt.NDArray[np.int16], out: Bytes) -> None:
    """Fill `out`, (places_bytes,), from (num_kept,) indices, shape of row after shape of row.

    Raises:
        ValueError: an index is outside its row, or they do not rise.
    """
    for group in _groups(layout, k):
        tables = [_table(indices, run) for run in group.runs]
        nbytes = group.code.nbytes(group.num_rows)
        group.code.write(tables[0] if len(tables) == 1 else np.concatenate(tables), out[:nbytes])
        out = out[nbytes:]


def read_places(layout: BucketLayout, k: int, data: Bytes) -> npt.NDArray[np.int16]:
    """(num_kept,) indices out of (places_bytes,) bytes.

    Raises:
        WireFormatError: these are no indices of such a block.
    """
    all_runs = runs(layout, k)
    indices = np.empty(all_runs[-1].kept_stop if all_runs else 0, dtype=np.int16)
    for group in _groups(layout, k):
        nbytes = group.code.nbytes(group.num_rows)
        if len(group.runs) == 1:
            group.code.read(data[:nbytes], _table(indices, group.runs[0]))
        else:
            table = np.empty((group.num_rows, group.code.row_kept), dtype=np.int16)
            group.code.read(data[:nbytes], table)
            start = 0
            for run in group.runs:
                _table(indices, run)[:] = table[start : start + run.num_rows]
                start += run.num_rows
        data = data[nbytes:]
    return indices


@functools.lru_cache(maxsize=128)
def _groups(layout: BucketLayout, k: int) -> tuple[_Group, ...]:
    """Rows by their shape, in the order in which shapes first occur."""
    shapes: dict[tuple[int, int], list[Run]] = {}
    for run in runs(layout, k):
        shapes.setdefault((run.row_numel, run.row_kept), []).append(run)
    return tuple(
        _Group(code_of(*shape), tuple(same), sum(run.num_rows for run in same))
        for shape, same in shapes.items()
    )


def _table(indices: npt.NDArray[np.int16], run: Run) -> npt.NDArray[np.int16]:
    """The run's part of all kept elements, a view of (num_rows, row_kept)."""
    return indices[run.kept_start : run.kept_stop].reshape(run.num_rows, run.row_kept)


def _rising(count: int) -> npt.NDArray[np.intp]:
    return np.arange(count, dtype=np.intp)


def _fault(rows: npt.NDArray[np.int16], row_numel: int) -> str:
    """What is wrong with indices, which must rise inside every row, so that none occurs twice."""
    if (rows[:, 1:] <= rows[:, :-1]).any():
        return "indices must rise inside every row."
    first, last = int(rows[:, 0].min()), int(rows[:, -1].max())
    if first < 0 or last >= row_numel:
        wrong = first if first < 0 else last
        return f"indices must be in 0 .. {row_numel - 1}, inside their row, got {wrong}."
    return ""
