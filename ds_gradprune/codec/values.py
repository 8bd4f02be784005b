"""How values are written: what every format promises; float32 and bfloat16. Local functions."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ds_gradprune.bucket.dispatch import kernels_on, threads
from ds_gradprune.codec.header import Bytes
from ds_gradprune.errors import WireFormatError

Floats: TypeAlias = npt.NDArray[np.float32]

MAX_BFLOAT16 = np.float32(torch.finfo(torch.bfloat16).max)

_SPAN_NUMEL = 1 << 16
"""Values rounded at a time: arrays of a quarter of a megabyte. A multiple of every block."""


class ValueFormat(abc.ABC):
    """A width of values on the wire. A subclass gives the reference, which the kernels equal.

    Attributes:
        name: short name for logs and file names.
        bits: bits of one value, scales not counted.
    """

    name: str
    bits: int

    @abc.abstractmethod
    def nbytes(self, count: int) -> int:
        """Bytes that `count` values take."""

    def write(self, values: torch.Tensor, out: Bytes) -> None:
        """Fill `out`, (nbytes,), from (n,) float32 values on the CPU, contiguous."""
        native = kernels_on(values.device)
        if native is None:
            self.reference_write(values.numpy(), out)
        else:
            native.write_values(self.bits, values.numpy(), out, threads())

    def read(self, data: Bytes, out: torch.Tensor) -> None:
        """Fill (n,) float32 `out` on the CPU, contiguous, from (nbytes,) that `check` accepts."""
        native = kernels_on(out.device)
        if native is None:
            self.reference_read(data, out.numpy())
        else:
            native.read_values(self.bits, data, out.numpy(), threads())

    @abc.abstractmethod
    def check(self, data: Bytes, count: int, *, finite: bool) -> None:
        """Find everything that may be wrong with (nbytes,) bytes.

        Args:
            data: arbitrary bytes.
            count: how many values they hold.
            finite: refuse inf and nan.

        Raises:
            WireFormatError: these are no such values.
        """

    @abc.abstractmethod
    def reference_write(self, values: Floats, out: Bytes) -> None:
        """`write` in numpy."""

    @abc.abstractmethod
    def reference_read(self, data: Bytes, out: Floats) -> None:
        """`read` in numpy."""


class Float32(ValueFormat):
    """Four bytes, nothing is lost."""

    name = "fp32"
    bits = 32

    def nbytes(self, count: int) -> int:
        """Four each."""
        return 4 * count

    def check(self, data: Bytes, count: int, *, finite: bool) -> None:
        """Any bits are a number."""
        if finite:
            check_finite(data.view("<u4"), 0x7F800000)

    def reference_write(self, values: Floats, out: Bytes) -> None:
        """Copy the bits."""
        out[:] = little_endian(values, "<f4")

    def reference_read(self, data: Bytes, out: Floats) -> None:
        """Copy the bits."""
        np.copyto(out.view(np.uint32), data.view("<u4"))


class Bfloat16(ValueFormat):
    """Two bytes: rounded to nearest, ties to even; what would overflow becomes the largest finite.

    The relative error of a value with a normal magnitude is at most 2**-8 (2**-7 beyond the largest
    finite bfloat16). Error feedback keeps it.
    """

    name = "bf16"
    bits = 16

    def nbytes(self, count: int) -> int:
        """Two each."""
        return 2 * count

    def check(self, data: Bytes, count: int, *, finite: bool) -> None:
        """Any bits are a number."""
        if finite:
            check_finite(data.view("<u2"), 0x7F80)

    def reference_write(self, values: Floats, out: Bytes) -> None:
        """Round and copy the bits, span by span: nothing as large as a model is made."""
        for span in spans(len(values)):
            out[2 * span.start : 2 * span.stop] = narrow(values[span])

    def reference_read(self, data: Bytes, out: Floats) -> None:
        """The bits are the upper half of a float32."""
        widen(data, out)


def spans(count: int) -> Iterator[slice]:
    """0 .. count - 1 in pieces that begin at multiples of 2**16."""
    for start in range(0, count, _SPAN_NUMEL):
        yield slice(start, min(count, start + _SPAN_NUMEL))


def check_finite(words: npt.NDArray[np.unsignedinteger[Any]], exponent: int) -> None:
    """Refuse floating point numbers whose bits `exponent` are all set: inf and nan.

    Raises:
        WireFormatError: there is one.
    """
    for span in spans(len(words)):
        if ((words[span] & exponent) == exponent).any():
            raise WireFormatError(
                "payload's values must be finite unless its header says otherwise, got inf or nan."
            )


def narrow(values: Floats) -> Bytes:
    """(n,) numbers as the (2 * n,) bytes of the nearest finite bfloat16; nan stays nan."""
    most = float(MAX_BFLOAT16)
    rounded = torch.from_numpy(values).clamp(-most, most).to(torch.bfloat16)
    return little_endian(rounded.view(torch.int16).numpy(), "<i2")


def widen(data: Bytes, out: Floats) -> None:
    """Fill (n,) `out` with the bfloat16 numbers in (2 * n,) bytes."""
    np.left_shift(data.view("<u2"), np.uint32(16), out=out.view(np.uint32))


def little_endian(numbers: npt.NDArray[np.generic], dtype: str) -> Bytes:
    """The bytes of a 1-D array; a view, except on a big-endian machine."""
    return np.ascontiguousarray(numbers, dtype=dtype).view(np.uint8)
