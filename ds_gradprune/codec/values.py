"""How one kept value is written: float32 or bfloat16, little endian. Local functions only."""

from __future__ import annotations

import abc
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

_SPAN_NUMEL = 1 << 18
"""Values rounded at a time: temporary tensors of a megabyte."""

_Bytes: TypeAlias = npt.NDArray[np.uint8]


class ValueFormat(abc.ABC):
    """A width of values on the wire.

    Attributes:
        name: short name for logs and file names.
        nbytes: bytes of one value.
    """

    name: str
    nbytes: int

    @abc.abstractmethod
    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """(n,) float32 as float32 that `write` keeps exactly; may be `values` itself."""

    @abc.abstractmethod
    def write(self, values: torch.Tensor, out: _Bytes) -> None:
        """Fill `out`, (n * nbytes,), from (n,) float32 values on any device."""

    @abc.abstractmethod
    def read(self, data: _Bytes) -> torch.Tensor:
        """(n,) float32 out of (n * nbytes,) bytes; a new tensor."""


class Float32(ValueFormat):
    """Four bytes, nothing is lost."""

    name = "fp32"
    nbytes = 4

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """The values themselves."""
        return values

    def write(self, values: torch.Tensor, out: _Bytes) -> None:
        """Copy the bits."""
        out[:] = _little_endian(values.contiguous().view(torch.int32).cpu().numpy(), "<i4")

    def read(self, data: _Bytes) -> torch.Tensor:
        """Copy the bits."""
        return torch.from_numpy(data.view("<i4").astype(np.int32)).view(torch.float32)


class Bfloat16(ValueFormat):
    """Two bytes: rounded to nearest, ties to even; what would overflow becomes the largest finite.

    The relative error of a value with a normal magnitude is at most 2**-8 (2**-7 beyond the largest
    finite bfloat16). Error feedback keeps it.
    """

    name = "bf16"
    nbytes = 2
    _max = float(torch.finfo(torch.bfloat16).max)

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """Round there and back."""
        return self._narrow(values).to(torch.float32)

    def write(self, values: torch.Tensor, out: _Bytes) -> None:
        """Round and copy the bits, span by span: nothing as large as a model is made."""
        for start in range(0, len(values), _SPAN_NUMEL):
            span = slice(start, start + _SPAN_NUMEL)
            bits = self._narrow(values[span]).view(torch.int16).cpu().numpy()
            out[2 * span.start : 2 * span.stop] = _little_endian(bits, "<i2")

    def read(self, data: _Bytes) -> torch.Tensor:
        """The bits are the upper half of a float32."""
        bits = data.view("<u2").astype(np.uint32)
        np.left_shift(bits, 16, out=bits)
        return torch.from_numpy(bits.view(np.float32))

    def _narrow(self, values: torch.Tensor) -> torch.Tensor:
        return values.clamp(-self._max, self._max).to(torch.bfloat16)


def _little_endian(numbers: npt.NDArray[np.generic], dtype: str) -> _Bytes:
    """The bytes of a 1-D array; a view, except on a big-endian machine."""
    return np.ascontiguousarray(numbers, dtype=dtype).view(np.uint8)
