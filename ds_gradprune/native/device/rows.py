"""Where rows lie in an accelerator's memory: in one flat vector, or one memory per segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

MAX_ROW_NUMEL = 4096


@dataclass(frozen=True)
class Rows:
    """Stretches of at most 4096 elements, one line each; tensors on the device.

    Attributes:
        starts: (rows,) int64, first element, counted from the start of the bucket.
        insides: (rows,) int64, the same, counted from the start of its segment.
        segments: (rows,) int32, the segment of every row.
        numels: (rows,) int32, elements of every row, 1 .. 4096.
        align: all starts, insides, are multiples of it: 4 or 1 elements.
        full: all rows have 4096 elements.
        count: number of rows.
    """

    starts: torch.Tensor
    insides: torch.Tensor
    segments: torch.Tensor
    numels: torch.Tensor
    align: int
    full: bool
    count: int

    def tables(self) -> tuple[torch.Tensor, ...]:
        """As kernels take them."""
        return self.starts, self.insides, self.segments, self.numels


@dataclass(frozen=True)
class Memory:
    """A vector of the bucket, whole or in one tensor per segment; all of one dtype.

    Attributes:
        flat: the vector; or the first of several tensors.
        bases: (segments,) int64, the tensors' addresses; None: it is whole. The caller keeps the
            tensors alive.
        align: addresses are multiples of this many elements: 4 or 1.
    """

    flat: torch.Tensor
    bases: torch.Tensor | None
    align: int

    @property
    def pointers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As kernels take them; the one that is not used is any tensor."""
        return self.flat, self.flat if self.bases is None else self.bases


def memory_of(parts: Sequence[torch.Tensor], bases: torch.Tensor | None) -> Memory:
    """Describe contiguous tensors, one per segment, or one in all if `bases` is None."""
    size = 4 * parts[0].element_size()
    aligned = all(part.data_ptr() % size == 0 for part in parts)
    return Memory(parts[0], bases, 4 if aligned else 1)


@dataclass(frozen=True)
class Source:
    """What t = (x + a * y) + b * z is; y and z are float32 of the whole bucket, or None."""

    x: Memory
    y: torch.Tensor | None
    a: float
    z: torch.Tensor | None
    b: float

    @property
    def dtype(self) -> torch.dtype:
        """Of x."""
        return self.x.flat.dtype

    def arguments(self) -> tuple[Any, ...]:
        """The kernels' first ones."""
        y = self.x.flat if self.y is None else self.y
        z = self.x.flat if self.z is None else self.z
        return *self.x.pointers, y, float(self.a), z, float(self.b)

    def constants(self, rows: Rows) -> dict[str, Any]:
        """The kernels' compile-time ones."""
        terms = [tensor for tensor in (self.y, self.z) if tensor is not None]
        aligned = all(tensor.data_ptr() % 16 == 0 for tensor in terms)
        return {
            "HAS_Y": self.y is not None,
            "HAS_Z": self.z is not None,
            "WHOLE": self.x.bases is None,
            "ALIGN": min(rows.align, self.x.align) if aligned else 1,
            "FULL": rows.full,
        }


@triton.jit
def row_of(flat, bases, starts, insides, segments, row, WHOLE: tl.constexpr, ALIGN: tl.constexpr):
    """Where a row begins: a pointer into x's memory, and its first element in the bucket."""
    start = tl.multiple_of(tl.load(starts + row), ALIGN)
    if WHOLE:
        where = flat + start
    else:
        base = tl.load(bases + tl.load(segments + row)).to(flat.dtype)
        inside = tl.multiple_of(tl.load(insides + row), ALIGN)
        where = tl.multiple_of(base, 4 * ALIGN) + inside
    return where, start


@triton.jit
def _add_one(x):
    tl.store(x, tl.load(x) + 1)


def probe(device: torch.device) -> None:
    """Compile and run something small.

    Raises:
        RuntimeError: it does not run, or not rightly.
    """
    number = torch.zeros(1, dtype=torch.int32, device=device)
    _add_one[(1,)](number)
    if number.item() != 1:
        raise RuntimeError(f"a kernel that adds one must give 1, got {number.item()}")
