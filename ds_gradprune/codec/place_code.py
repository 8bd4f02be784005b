"""How the indices of rows of one shape are written: the codes that `places` chooses from, in numpy.

Local functions only. The format is described at the head of `places`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ds_gradprune.codec.bits import pack, packed_bytes, unpack
from ds_gradprune.codec.header import Bytes
from ds_gradprune.errors import WireFormatError
from ds_gradprune.native.library import Shorts

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

    def write(self, start: int, rows: Shorts, num_rows: int, out: Bytes) -> None:
        """Write the indices of some rows where they belong among those of all.

        Args:
            start: number of the first of the rows, a multiple of 8.
            rows: (n, row_kept) indices; n a multiple of 8, or these are the last rows.
            num_rows: number of all rows.
            out: (nbytes,) of all rows; written in part.

        Raises:
            ValueError: an index is outside its row, or they do not rise.
        """
        fault = _fault(rows, self.row_numel)
        if fault:
            raise ValueError(f"block's {fault}")
        low, high = self._parts(start, len(rows), num_rows, out)
        pack(rows.reshape(-1), self.low_bits, low)
        if self.row_bits:
            flags = np.zeros(len(high) * 8, dtype=np.bool_)
            flags[(self._origins(len(rows)) + (rows >> self.low_bits)).reshape(-1)] = True
            high[:] = np.packbits(flags, bitorder="little")

    def read(self, start: int, rows: Shorts, num_rows: int, data: Bytes) -> None:
        """Fill `rows` from what `write` made of them.

        Args:
            start: as in `write`.
            rows: (n, row_kept), overwritten; after an error with anything.
            num_rows: as in `write`.
            data: (nbytes,) of all rows, arbitrary.

        Raises:
            WireFormatError: these are no indices of such rows.
        """
        if self.row_kept == self.row_numel:
            rows[:] = np.arange(self.row_numel, dtype=np.int16)
            return
        low, high = self._parts(start, len(rows), num_rows, data)
        rows[:] = unpack(low, rows.size, self.low_bits).reshape(rows.shape)
        if self.row_bits:
            self._add_upper(high, rows)
        fault = _fault(rows, self.row_numel)
        if fault:
            raise WireFormatError(f"payload's {fault}")

    def _add_upper(self, data: Bytes, rows: Shorts) -> None:
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
    def block_rows(self) -> int:
        """Rows worked on at a time: a multiple of 8, so every block begins with a whole byte."""
        return max(8, _BLOCK_BITS // (8 * self.row_kept + self.row_bits) // 8 * 8)

    def _parts(self, start: int, count: int, num_rows: int, data: Bytes) -> tuple[Bytes, Bytes]:
        """Views: the lower and the upper parts of rows start .. start + count - 1 of all."""
        stop, split = start + count, self.low_bytes(num_rows)
        low = data[self.low_bytes(start) : self.low_bytes(stop)]
        high = data[split + start * self.row_bits // 8 : split + -(-stop * self.row_bits // 8)]
        return low, high

    def _origins(self, num_rows: int) -> npt.NDArray[np.intp]:
        """(num_rows, row_kept or 1): the bit that an element with upper part 0 sets."""
        origins: npt.NDArray[np.intp] = _rising(num_rows)[:, None] * self.row_bits
        return origins + _rising(self.row_kept) if self.run_length else origins


@functools.lru_cache(maxsize=4096)
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


def _rising(count: int) -> npt.NDArray[np.intp]:
    return np.arange(count, dtype=np.intp)


def _fault(rows: Shorts, row_numel: int) -> str:
    """What is wrong with indices, which must rise inside every row, so that none occurs twice."""
    if (rows[:, 1:] <= rows[:, :-1]).any():
        return "indices must rise inside every row."
    first, last = int(rows[:, 0].min()), int(rows[:, -1].max())
    if first < 0 or last >= row_numel:
        wrong = first if first < 0 else last
        return f"indices must be in 0 .. {row_numel - 1}, inside their row, got {wrong}."
    return ""
