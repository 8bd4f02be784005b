"""What lies where in a bucket: its segments, their rows, and how many elements each row keeps.

A *bucket* is one flat vector of fp32 elements. Its layout cuts it into segments, one per tensor. A
pruned segment is cut into rows of `CHUNK_NUMEL` consecutive elements, the last of which may be
shorter. A dense segment is always sent whole. Knows nothing of tensors. All functions are local.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import google_crc32c
import numpy as np

CHUNK_NUMEL = 4096
"""Elements of a full row: an index inside a row fits 12 bits."""

_DERIVED_MAX = 64
"""Derived tables kept per layout; the oldest is dropped. A run uses a few amounts at a time."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of consecutive elements of a bucket: one tensor.

    Attributes:
        offset: first element, counted from the start of the bucket.
        numel: number of elements, >= 0.
        pruned: True: the largest elements of every row are sent; False: every element is.
    """

    offset: int
    numel: int
    pruned: bool


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of equal length that follow each other in one segment.

    Attributes:
        segment: index of the segment in the layout.
        bucket_start: first element, counted from the start of the bucket.
        num_rows: number of rows.
        row_numel: elements per row, 1 .. CHUNK_NUMEL.
        row_kept: elements kept per row, 1 .. row_numel.
        kept_start: first kept element, counted among all kept elements of the bucket.
    """

    segment: int
    bucket_start: int
    num_rows: int
    row_numel: int
    row_kept: int
    kept_start: int

    @property
    def bucket_stop(self) -> int:
        """One past the last element in the bucket."""
        return self.bucket_start + self.num_rows * self.row_numel

    @property
    def kept_stop(self) -> int:
        """One past the last kept element."""
        return self.kept_start + self.num_rows * self.row_kept

    def rows(self, start: int, stop: int) -> Run:
        """Rows start .. stop - 1 of this run."""
        return Run(
            self.segment,
            self.bucket_start + start * self.row_numel,
            stop - start,
            self.row_numel,
            self.row_kept,
            self.kept_start + start * self.row_kept,
        )


class BucketLayout:
    """The segments of a bucket. Equal on all ranks; hashed and compared by identity.

    Args:
        segments: in order, without gap or overlap, from element 0 on.

    Attributes:
        segments: see there.
        numel: elements of the whole bucket.
        pruned_numel: elements in pruned segments.
        dense_numel: elements in segments that are always sent whole.
        dense_runs: (first element, number of elements) of the dense segments in order; neighbours
            are one run, empty segments are left out.
        crc: crc32c over the chunk size, the bucket's size and every segment: equal for layouts that
            mean the same, on every rank.

    Raises:
        ValueError: a segment has a negative size or does not begin where the one before ends.
    """

    __slots__ = (
        "__weakref__", "_derived", "crc", "dense_numel", "dense_runs", "numel", "pruned_numel",
        "segments",
    )  # fmt: skip

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self.numel = _end_of(self.segments)
        self.pruned_numel = sum(s.numel for s in self.segments if s.pruned)
        self.dense_numel = self.numel - self.pruned_numel
        self.dense_runs = _dense_runs(self.segments)
        self.crc = _crc(self.segments, self.numel)
        self._derived: dict[Hashable, object] = {}

    def __repr__(self) -> str:
        return (
            f"BucketLayout({len(self.segments)} segments, {self.pruned_numel} pruned + "
            f"{self.dense_numel} dense elements, crc {self.crc:08x})"
        )

    def runs(self, k: int) -> tuple[Run, ...]:
        """The pruned rows in order: of every segment its full rows, then its shorter last row.

        Runs are never merged over segments, which may lie in different memory.

        Args:
            k: kept elements per full row, 1 .. CHUNK_NUMEL; a row of t < CHUNK_NUMEL elements keeps
                ceil(k * t / CHUNK_NUMEL).

        Raises:
            ValueError: k is out of range.
        """
        return self.derived(("runs", k), lambda: _runs(self.segments, k))

    def num_kept(self, k: int) -> int:
        """Elements that pruned segments keep at `k` per full row.

        Raises:
            ValueError: k is outside 1 .. CHUNK_NUMEL.
        """
        runs = self.runs(k)
        return runs[-1].kept_stop if runs else 0

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, kept with this layout under `key`; not to be changed.

        For small tables that follow from the layout alone. The newest few are kept.
        """
        found = self._derived.get(key)
        if found is None:
            found = make()
            self._derived[key] = found
            while len(self._derived) > _DERIVED_MAX:
                # Another thread may have dropped it already.
                self._derived.pop(next(iter(self._derived)), None)
        return cast("T", found)


def lay_out(numels: Sequence[int], pruned: Sequence[bool]) -> BucketLayout:
    """Lay tensors one after the other into a bucket.

    Args:
        numels: elements of each tensor, in the bucket's order; 0 is allowed.
        pruned: for each tensor whether its largest elements alone are sent.

    Returns:
        A layout with one segment per tensor.

    Raises:
        ValueError: the sequences differ in length, or a number is negative.
    """
    if len(numels) != len(pruned):
        raise ValueError(
            f"numels and pruned must have one entry per tensor, got {len(numels)} and "
            f"{len(pruned)}."
        )
    segments, offset = [], 0
    for numel, is_pruned in zip(numels, pruned, strict=True):
        segments.append(Segment(offset, numel, is_pruned))
        offset += numel
    return BucketLayout(segments)


@functools.lru_cache(maxsize=1024)
def kept_per_chunk(density: float) -> int:
    """Elements kept of each full row: k = max(1, ceil(density * CHUNK_NUMEL)).

    Args:
        density: kept / all, in (0, 1].

    Returns:
        k, 1 .. CHUNK_NUMEL. k == CHUNK_NUMEL keeps everything.

    Raises:
        ValueError: the density is out of range.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density!r}.")
    return max(1, math.ceil(density * CHUNK_NUMEL))


def _end_of(segments: tuple[Segment, ...]) -> int:
    end = 0
    for number, segment in enumerate(segments):
        if segment.numel < 0:
            raise ValueError(f"segments[{number}].numel must be at least 0, got {segment.numel}.")
        if segment.offset != end:
            raise ValueError(
                f"segments[{number}].offset must be {end}, where the segment before it ends, got "
                f"{segment.offset}."
            )
        end += segment.numel
    return end


def _crc(segments: tuple[Segment, ...], numel: int) -> int:
    numbers = [CHUNK_NUMEL, numel]
    for segment in segments:
        numbers += [segment.offset, segment.numel, int(segment.pruned)]
    return int(google_crc32c.value(np.array(numbers, dtype="<u8").tobytes()))


def _dense_runs(segments: tuple[Segment, ...]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for segment in segments:
        if segment.pruned or not segment.numel:
            continue
        if runs and sum(runs[-1]) == segment.offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + segment.numel)
        else:
            runs.append((segment.offset, segment.numel))
    return tuple(runs)


def _runs(segments: tuple[Segment, ...], k: int) -> tuple[Run, ...]:
    if not 1 <= k <= CHUNK_NUMEL:
        raise ValueError(f"k must be in 1 .. {CHUNK_NUMEL}, got {k}.")
    runs: list[Run] = []
    kept_start = 0
    for number, segment in enumerate(segments):
        if not segment.pruned:
            continue
        full, tail = divmod(segment.numel, CHUNK_NUMEL)
        start = segment.offset
        for num_rows, row_numel in ((full, CHUNK_NUMEL), (1, tail)):
            if num_rows and row_numel:
                row_kept = -(-k * row_numel // CHUNK_NUMEL)
                runs.append(Run(number, start, num_rows, row_numel, row_kept, kept_start))
                start, kept_start = runs[-1].bucket_stop, runs[-1].kept_stop
    return tuple(runs)
