"""The rows of a bucket as a receiver counts them, and whether indices fit them. Local."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ds_gradprune.errors import WireFormatError
from ds_gradprune.records import CHUNK_NUMEL, BucketLayout


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows of equal length that follow each other among the kept elements.

    Attributes:
        start: first kept element.
        rows: number of rows.
        kept: elements kept per row.
        numel: elements per row.
    """

    start: int
    rows: int
    kept: int
    numel: int

    @property
    def stop(self) -> int:
        """One past the last kept element."""
        return self.start + self.rows * self.kept


@functools.lru_cache(maxsize=64)
def row_groups(layout: BucketLayout, k: int) -> tuple[RowGroup, ...]:
    """The pruned rows of a bucket, in order; see `SparseBlock` for how many each keeps.

    Raises:
        ValueError: k is outside 1 .. CHUNK_NUMEL.
    """
    if not 1 <= k <= CHUNK_NUMEL:
        raise ValueError(f"k must be in 1 .. {CHUNK_NUMEL}, got {k}.")
    groups: list[RowGroup] = []
    for segment in layout.segments:
        full, tail = divmod(segment.numel, CHUNK_NUMEL) if segment.pruned else (0, 0)
        for rows, numel in ((full, CHUNK_NUMEL), (int(tail > 0), tail)):
            if not rows:
                continue
            kept = -(-k * numel // CHUNK_NUMEL)
            if groups and groups[-1].numel == numel:
                last = groups.pop()
                groups.append(RowGroup(last.start, last.rows + rows, kept, numel))
            else:
                groups.append(RowGroup(groups[-1].stop if groups else 0, rows, kept, numel))
    return tuple(groups)


def num_kept(layout: BucketLayout, k: int) -> int:
    """Elements that pruned segments keep at `k` per full row."""
    groups = row_groups(layout, k)
    return groups[-1].stop if groups else 0


def check_indices(indices: npt.NDArray[np.int16], layout: BucketLayout, k: int) -> None:
    """Indices must lie inside their row and rise, so that none occurs twice.

    Args:
        indices: (num_kept,), >= 0.
        layout: the bucket's layout.
        k: kept elements per full row.

    Raises:
        WireFormatError: they do not.
    """
    for group in row_groups(layout, k):
        table = indices[group.start : group.stop].reshape(group.rows, group.kept)
        if (table[:, 1:] <= table[:, :-1]).any():
            raise WireFormatError("payload's indices must rise inside every row.")
        last = int(table[:, -1].max())
        if last >= group.numel:
            raise WireFormatError(
                f"payload's indices must be below {group.numel}, the length of their row, "
                f"got {last}."
            )
