"""The rows of a bucket: where they lie in it, and how many elements each keeps.

A row is a chunk of a pruned segment. Selection and every codec count with these. All functions are
local; knows nothing of tensors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ds_gradprune.records import CHUNK_NUMEL, BucketLayout


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of equal length, neighbours in the bucket and among the kept elements.

    Attributes:
        bucket_start: first element, counted from the start of the bucket.
        num_rows: number of rows.
        row_numel: elements per row.
        row_kept: elements kept per row.
        kept_start: first kept element, counted among all kept elements of the bucket.
    """

    bucket_start: int
    num_rows: int
    row_numel: int
    row_kept: int
    kept_start: int

    @property
    def kept_stop(self) -> int:
        """One past the last kept element."""
        return self.kept_start + self.num_rows * self.row_kept

    def rows(self, start: int, stop: int) -> Run:
        """Rows start .. stop - 1 of this run."""
        return Run(
            self.bucket_start + start * self.row_numel,
            stop - start,
            self.row_numel,
            self.row_kept,
            self.kept_start + start * self.row_kept,
        )


def num_kept(layout: BucketLayout, k: int) -> int:
    """Elements that pruned segments keep at `k` per full row.

    Raises:
        ValueError: k is outside 1 .. CHUNK_NUMEL.
    """
    all_runs = runs(layout, k)
    return all_runs[-1].kept_stop if all_runs else 0


@functools.lru_cache(maxsize=128)
def runs(layout: BucketLayout, k: int) -> tuple[Run, ...]:
    """The pruned rows in order; rows that are neighbours in every sense are one run.

    Raises:
        ValueError: k is outside 1 .. CHUNK_NUMEL.
    """
    if not 1 <= k <= CHUNK_NUMEL:
        raise ValueError(f"k must be in 1 .. {CHUNK_NUMEL}, got {k}.")
    found: list[Run] = []
    kept_start = 0
    for segment in layout.segments:
        if not segment.pruned:
            continue
        full, tail = divmod(segment.numel, CHUNK_NUMEL)
        if full:
            last = found[-1] if found else None
            end = last.bucket_start + last.num_rows * CHUNK_NUMEL if last is not None else -1
            if last is not None and last.row_numel == CHUNK_NUMEL and end == segment.offset:
                found[-1] = Run(
                    last.bucket_start, last.num_rows + full, CHUNK_NUMEL, k, last.kept_start
                )
            else:
                found.append(Run(segment.offset, full, CHUNK_NUMEL, k, kept_start))
            kept_start += full * k
        if tail:
            row_kept = -(-k * tail // CHUNK_NUMEL)
            start = segment.offset + full * CHUNK_NUMEL
            found.append(Run(start, 1, tail, row_kept, kept_start))
            kept_start += row_kept
    return tuple(found)
