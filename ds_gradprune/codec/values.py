"""How values are written: what every format promises; float32 and bfloat16. Local functions."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ds_gradprune.codec.base import Bytes

Floats: TypeAlias = npt.NDArray[np.float32]

MAX_BFLOAT16 = np.float32(torch.finfo(torch.bfloat16).max)

_SPAN_NUMEL = 1 << 16
"""Values rounded at a time: arrays of a quarter of a megabyte. A multiple of every block."""


class ValueFormat(abc.ABC):
    """A width of values on the wire.

    Attributes:
        name: short name for logs and file names.
        bits: bits of one value, scales not counted.
    """

    name: str
    bits: int

    @abc.abstractmethod
    def nbytes(self, count: int) -> int:
        """Bytes that `count` values take."""

    @abc.abstractmethod
    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """(n,) float32 as what `read` makes of what `write` wrote; may be `values` itself."""

    @abc.abstractmethod
    def write(self, values: torch.Tensor, out: Bytes) -> None:
        """Fill `out`, (nbytes,), from (n,) float32 values on any device."""

    @abc.abstractmethod
    def read(self, data: Bytes, count: int) -> torch.Tensor:
        """(count,) float32 out of (nbytes,) bytes; a new tensor.

        Raises:
            WireFormatError: an unused bit is not zero.
        """


class Float32(ValueFormat):
    """Four bytes, nothing is lost."""

    name = "fp32"
    bits = 32

    def nbytes(self, count: int) -> int:
        """Four each."""
        return 4 * count

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """The values themselves."""
        return values

    def write(self, values: torch.Tensor, out: Bytes) -> None:
        """Copy the bits."""
        out[:] = little_endian(values.contiguous().view(torch.int32).cpu().numpy(), "<i4")

    def read(self, data: Bytes, count: int) -> torch.Tensor:
        """Copy the bits."""
        return torch.from_numpy(data.view("<i4").astype(np.int32)).view(torch.float32)


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

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """Round there and back."""
        return narrow(values).to(torch.float32)

    def write(self, values: torch.Tensor, out: Bytes) -> None:
        """Round and copy the bits, span by span: nothing as large as a model is made."""
        for span in spans(len(values)):
            bits = narrow(values[span]).view(torch.int16).cpu().numpy()
            out[2 * span.start : 2 * span.stop] = little_endian(bits, "<i2")

    def read(self, data: Bytes, count: int) -> torch.Tensor:
        """The bits are the upper half of a float32."""
        return torch.from_numpy(widen(data))


def spans(count: int) -> Iterator[slice]:
    """0 .. count - 1 in pieces that begin at multiples of 2**16."""
    for start in range(0, count, _SPAN_NUMEL):
        yield slice(start, min(count, start + _SPAN_NUMEL))


def narrow(values: torch.Tensor) -> torch.Tensor:
    """To the nearest finite bfloat16; nan stays nan."""
    return values.clamp(-float(MAX_BFLOAT16), float(MAX_BFLOAT16)).to(torch.bfloat16)


def widen(data: Bytes) -> Floats:
    """Bytes of bfloat16 numbers as float32."""
    bits = data.view("<u2").astype(np.uint32)
    np.left_shift(bits, 16, out=bits)
    numbers: Floats = bits.view(np.float32)
    return numbers


def little_endian(numbers: npt.NDArray[np.generic], dtype: str) -> Bytes:
    """The bytes of a 1-D array; a view, except on a big-endian machine."""
    return np.ascontiguousarray(numbers, dtype=dtype).view(np.uint8)
