"""A sparse block: what one rank sends of one bucket, and memory to build blocks in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_gradprune.bucket.layout import BucketLayout

_DTYPES = {"indices": torch.int16, "values": torch.float32, "dense": torch.float32}


@dataclass(frozen=True, slots=True, eq=False)
class SparseBlock:
    """What one rank sends of one bucket.

    Rows are those of all pruned segments in order, see `BucketLayout.runs`.

    Attributes:
        layout: the bucket's layout.
        k: kept elements per full row, 1 .. CHUNK_NUMEL.
        indices: (num_kept,) int16, position inside the row, ascending inside each row. Rows follow
            each other without gap.
        values: (num_kept,) float32, the kept elements.
        dense: (layout.dense_numel,) float32, the dense segments one after the other.
    """

    layout: BucketLayout
    k: int
    indices: torch.Tensor
    values: torch.Tensor
    dense: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.values.device

    def is_finite(self) -> bool:
        """No value is inf or nan. Waits for the device."""
        return _is_finite(self.values) and _is_finite(self.dense)


class Scratch:
    """Memory for one block at a time. It grows to the largest block and is kept.

    Args:
        device: where the blocks are.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._memory = {
            name: torch.empty(0, dtype=dtype, device=device) for name, dtype in _DTYPES.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self._memory.values())

    def block(self, layout: BucketLayout, k: int) -> SparseBlock:
        """A block whose content is undefined, in memory that the next call uses again.

        Args:
            layout: the bucket's layout.
            k: kept elements per full row.

        Raises:
            ValueError: k is outside 1 .. CHUNK_NUMEL.
        """
        kept, dense = layout.num_kept(k), layout.dense_numel
        parts = {"indices": kept, "values": kept, "dense": dense}
        return SparseBlock(layout, k, **{name: self._view(name, n) for name, n in parts.items()})

    def _view(self, name: str, numel: int) -> torch.Tensor:
        device = self._memory[name].device
        if self._memory[name].numel() < numel:
            del self._memory[name]  # before its successor is allocated
            self._memory[name] = torch.empty(numel, dtype=_DTYPES[name], device=device)
        return self._memory[name][:numel]


def empty_block(layout: BucketLayout, k: int, device: torch.device | str = "cpu") -> SparseBlock:
    """A block in new memory; its content is undefined.

    Raises:
        ValueError: k is outside 1 .. CHUNK_NUMEL.
    """
    return Scratch(device).block(layout, k)


def check_block(block: SparseBlock, name: str = "block") -> None:
    """Refuse a block whose tensors do not fit its layout and k.

    Raises:
        ValueError: a shape or a dtype is wrong.
    """
    kept = block.layout.num_kept(block.k)
    for field, dtype in _DTYPES.items():
        tensor: torch.Tensor = getattr(block, field)
        numel = block.layout.dense_numel if field == "dense" else kept
        if tensor.shape != (numel,) or tensor.dtype is not dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name}.{field} must be contiguous {dtype} of shape ({numel},) at k = {block.k}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}."
            )


def _is_finite(data: torch.Tensor) -> bool:
    if not data.numel():
        return True
    low, high = torch.aminmax(data)  # no copy; nan wins in both
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
