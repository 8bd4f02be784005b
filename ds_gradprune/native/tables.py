"""What the kernels are told: tables that say where things lie, and blocks.

Tables are (n, columns) int64 and C-contiguous; make them once for a layout and k:

* rows: one line per `Run`: bucket_start, num_rows, row_numel, row_kept, kept_start.
* pieces: one line per stretch of dense elements, in order: bucket_start, numel. A stretch lies in
  one memory: one line per dense segment where segments lie apart.
* places: one line per run, the runs of one shape together, shapes in order of first occurrence:
  row_numel, row_kept, low_bits, row_bits, run_length (0 or 1), num_rows, kept_start.

Addresses are (n,) int64, one per line of a table: of the first element of the run or piece. For a
flat tensor that is ``data_ptr() + itemsize * table[:, 0]``. The caller keeps the memory alive.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]
Shorts: TypeAlias = npt.NDArray[np.int16]
Longs: TypeAlias = npt.NDArray[np.int64]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Words: TypeAlias = npt.NDArray[np.uint64]


class Fault(enum.IntEnum):
    """What is wrong with a body or a block; the reference has the words for it."""

    NONE = 0
    SCALES = 1  # a block's ends are negative, infinite or out of order
    UNUSED_BITS = 2  # an unused bit is not zero
    UPPER_BITS = 3  # the bits set in a row's upper parts are not as many as it keeps
    ORDER = 4  # indices do not rise inside a row
    RANGE = 5  # an index is outside its row


class Block(NamedTuple):
    """What one rank sent, and what `Kernels.move` does with it.

    Attributes:
        indices: (num_kept,) int16.
        values: (num_kept,) float32.
        dense: (dense_numel,) float32.
        factor: shared += factor * value; None: the shared weights stay.
        sent: this is the own block: own progress loses it.
    """

    indices: Shorts
    values: Floats
    dense: Floats
    factor: float | None
    sent: bool = False


class RunLike(Protocol):
    """What `rows_table` reads of a `Run`."""

    @property
    def bucket_start(self) -> int:
        """As there."""

    @property
    def num_rows(self) -> int:
        """As there."""

    @property
    def row_numel(self) -> int:
        """As there."""

    @property
    def row_kept(self) -> int:
        """As there."""

    @property
    def kept_start(self) -> int:
        """As there."""


def rows_table(runs: Iterable[RunLike]) -> Longs:
    """The table of runs."""
    lines = [(r.bucket_start, r.num_rows, r.row_numel, r.row_kept, r.kept_start) for r in runs]
    return np.array(lines, dtype=np.int64).reshape(-1, 5)


def pieces_table(pieces: Iterable[tuple[int, int]]) -> Longs:
    """The table of dense pieces, from (bucket_start, numel) of each."""
    return np.array(list(pieces), dtype=np.int64).reshape(-1, 2)


def places_table(groups: Iterable[tuple[Any, Iterable[RunLike]]]) -> Longs:
    """The table of places, from (PlaceCode, its runs) of every shape."""
    lines = [
        (c.row_numel, c.row_kept, c.low_bits, c.row_bits, c.run_length, r.num_rows, r.kept_start)
        for c, runs in groups
        for r in runs
    ]
    return np.array(lines, dtype=np.int64).reshape(-1, 7)
