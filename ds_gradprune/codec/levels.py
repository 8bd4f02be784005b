"""Values of 4 or 2 bits: a sign and one of a few magnitudes between two ends. Local functions only.

References:
    P. H. Sterbenz: Floating-point computation. Prentice-Hall, 1974, theorem 4.3.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ds_gradprune.codec.bits import pack, packed_bytes, unpack
from ds_gradprune.codec.header import Bytes
from ds_gradprune.codec.values import (
    MAX_BFLOAT16,
    Floats,
    ValueFormat,
    check_finite,
    narrow,
    spans,
    widen,
)
from ds_gradprune.errors import WireFormatError
from ds_gradprune.native import library

BLOCK_NUMEL = 128
"""Values that share two ends."""

_SHARES = {
    2: (0.0, 1.0),
    4: tuple(share / 128 for share in (0, 10, 22, 36, 53, 74, 98, 128)),
}
"""Bits -> t of every magnitude: steps grow by a fifth, because large magnitudes are rarer."""

_WIDEST = {2: 3.0, 4: 15.0}
"""Bits -> high / low of a block, above which low becomes 0."""


class Levels(ValueFormat):
    """A sign and one of a few magnitudes between the two ends of a block of 128 values.

    What survives selection is larger in magnitude than what does not, so a block's magnitudes fill
    a band and leave the room below it empty; most lie near its lower end. The levels are
    ``low + t * (high - low)``, t from 0 to 1 (`_SHARES`). With 4 bits low and high are the ends of
    the band; with 2, the means of its magnitudes up to their mean and above it, low at most 1.9
    times the least. Where high is more than `_WIDEST` times low, low is 0. Both are bfloat16.

    A value x becomes the nearest level q of its own sign. With normal magnitudes |q| <= 2 |x|, so
    no residual is larger than its value, and ``x - q`` and ``(x - q) + q`` are exact in float32:

    * q = 0: trivially.
    * |x| / 2 <= |q| <= 2 |x|: by Sterbenz' lemma. This holds for all x between two levels above 0,
      as a level is at most three times the one before, and for x between 0 and the first, unless
      q = 0.
    * |q| < |x| / 2: then q is high, a mean of less than 128 magnitudes. It has 8 significant bits
      and |x| < 256 |q|, so x - q is a multiple of the last bit of x, and no larger than x.

    On the wire: low and high of every block, then the numbers of the levels, the sign above them.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.name = f"{bits}bit"
        self.shares, self.widest = _SHARES[bits], _WIDEST[bits]
        self._shares: Floats = np.array(self.shares, dtype=np.float32)
        self._shares_of_both: Floats = np.tile(self._shares, 2)
        self._widest = np.float32(self.widest)

    def nbytes(self, count: int) -> int:
        """Four for every block begun, and the levels' bits."""
        return self._ends_bytes(count) + packed_bytes(count, self.bits)

    def _ends_bytes(self, count: int) -> int:
        return -(-count // BLOCK_NUMEL) * 4

    def reference_write(self, values: Floats, out: Bytes) -> None:
        """Choose levels, span by span: nothing as large as a model is made."""
        split = self._ends_bytes(len(values))
        for span in spans(len(values)):
            ends, codes = self._choose(values[span])
            bits = narrow(ends.reshape(-1))
            start = self._ends_bytes(span.start)
            out[start : start + len(bits)] = bits
            pack(codes, self.bits, self._codes(out[split:], span))

    def reference_read(self, data: Bytes, out: Floats) -> None:
        """Look the levels up."""
        split = self._ends_bytes(len(out))
        for span in spans(len(out)):
            codes = unpack(self._codes(data[split:], span), span.stop - span.start, self.bits)
            blocks = slice(self._ends_bytes(span.start), self._ends_bytes(span.stop))
            out[span] = self._look_up(_wide(data[blocks]), codes)

    def check(self, data: Bytes, count: int, *, finite: bool) -> None:
        """Scales must be in order, unused bits zeros."""
        native = library.kernels()
        if native is None or native.check_values(self.bits, data, count):
            self.reference_check(data, count)
        if finite:
            check_finite(data[: self._ends_bytes(count)].view("<u2"), 0x7F80)

    def reference_check(self, data: Bytes, count: int) -> None:
        """`check` in numpy, but for inf and nan, of which nan is no fault.

        Raises:
            WireFormatError: see `check`.
        """
        split = self._ends_bytes(count)
        for span in spans(split // 4):
            ends = _wide(data[4 * span.start : 4 * span.stop])
            wrong = (ends < 0.0) | (ends > MAX_BFLOAT16) | (ends[:, :1] > ends[:, 1:])
            if wrong.any():  # nan is none of these: the header tells of it
                low, high = ends[wrong.any(axis=1)][0].tolist()
                raise WireFormatError(
                    f"payload's scales must be finite, >= 0 and in order, got {low} and {high}."
                )
        used_bits = count * self.bits % 8
        if used_bits and data[-1] >> used_bits:
            raise WireFormatError("payload's unused bits must be zeros.")

    def _codes(self, data: Bytes, span: slice) -> Bytes:
        """The bytes of the levels' numbers of a span."""
        return data[packed_bytes(span.start, self.bits) : packed_bytes(span.stop, self.bits)]

    def _choose(self, values: Floats) -> tuple[Floats, Bytes]:
        """Ends of all blocks, (blocks, 2), and the (n,) numbers of the nearest levels."""
        count = len(values)
        # A last block that is not full is filled with its last value, which moves no end.
        padded = np.full(-(-count // BLOCK_NUMEL) * BLOCK_NUMEL, values[-1])
        padded[:count] = values
        magnitudes = np.abs(padded).reshape(-1, BLOCK_NUMEL)
        ends = self._ends(magnitudes)
        levels = self._levels(ends)
        codes = np.zeros(magnitudes.shape, dtype=np.uint8)
        for lower, upper in zip(levels.T[:-1], levels.T[1:], strict=True):
            codes += magnitudes > (lower * 0.5 + upper * 0.5)[:, None]
        codes |= np.signbit(padded).view(np.uint8).reshape(codes.shape) << (self.bits - 1)
        return ends, codes.reshape(-1)[:count]

    def _ends(self, magnitudes: Floats) -> Floats:
        """Low and high of every row, as bfloat16 holds them."""
        low, high = magnitudes.min(axis=1), magnitudes.max(axis=1)
        if len(self._shares) < 4:
            least = low
            share = np.minimum(magnitudes, MAX_BFLOAT16) * np.float32(1 / BLOCK_NUMEL)
            above = share > share.sum(axis=1)[:, None] * np.float32(1 / BLOCK_NUMEL)
            low = _mean(share, ~above)
            high = np.maximum(_mean(share, above), low)  # none is above if all are equal
            low = np.minimum(low, np.minimum(least, MAX_BFLOAT16 / 2) * np.float32(1.9))
        ends = _wide(narrow(np.stack((low, high), axis=1).reshape(-1)))
        ends[ends[:, 1] / self._widest > ends[:, 0], 0] = 0.0
        return ends

    def _levels(self, ends: Floats) -> Floats:
        """Magnitudes of all levels of every block, (blocks, 2 or 8), rising."""
        low, high = ends[:, :1], ends[:, 1:]
        levels: Floats = low + self._shares * (high - low)
        return levels

    def _look_up(self, ends: Floats, codes: npt.NDArray[np.integer[Any]]) -> Floats:
        """The (n,) values that the numbers stand for: `_levels`, where it is asked for."""
        low, high = ends[:, :1], ends[:, 1:]
        values = np.zeros((len(ends), BLOCK_NUMEL), dtype=np.float32)
        flat: Floats = values.reshape(-1)[: len(codes)]
        # The sign is the upper half of the table. "clip" never acts, but spares a copy.
        self._shares_of_both.take(codes, out=flat, mode="clip")
        values *= high - low
        values += low
        bits = flat.view(np.uint32)
        bits |= (codes >> (self.bits - 1)).astype(np.uint32) << 31
        return flat


def _wide(data: Bytes) -> Floats:
    """(4 * blocks,) bytes as the (blocks, 2) ends in them."""
    ends = np.empty(len(data) // 2, dtype=np.float32)
    widen(data, ends)
    return ends.reshape(-1, 2)


def _mean(shares: Floats, chosen: npt.NDArray[np.bool_]) -> Floats:
    """Mean of the chosen of every row, times the row's length."""
    count = np.maximum(chosen.sum(axis=1, dtype=np.float32), 1)
    mean: Floats = (shares * chosen).sum(axis=1) * (np.float32(shares.shape[1]) / count)
    return mean
