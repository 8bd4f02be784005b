"""The kernels as Python functions: numpy arrays and addresses in, nothing allocated per call.

All functions work on CPU memory and equal their numpy or torch references bit for bit, whatever
`threads` is. They release the interpreter lock. The bits of nan results are not promised.

Tables say where things lie. They are (n, columns) int64 and C-contiguous; make them once for a
layout and k, with `rows_table`, `pieces_table` and `places_table`:

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
from collections.abc import Iterable, Sequence
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


class Kernels:
    """The functions of one loaded library."""

    def select(
        self,
        rows: Longs,
        x: Longs,
        indices: Shorts,
        values: Floats,
        *,
        y: Floats | None = None,
        a: float = 1.0,
        z: Floats | None = None,
        b: float = 1.0,
        dtype: str = "float32",
        threads: int = 1,
    ) -> bool:
        """Keep the largest magnitudes of every row of t = (x + a*y) + b*z.

        Args:
            rows: table.
            x: addresses of the runs.
            indices: (num_kept,), written; ascending in each row.
            values: (num_kept,), written: t there.
            y: (numel,) of the whole bucket; None: not added.
            a: its factor, rounded to float32; product and sum are rounded one by one.
            z: as y.
            b: its factor.
            dtype: of x: "float32", "bfloat16" or "float16".
            threads: at most so many work at once.

        Returns:
            All of t is finite (if some are not, some of them are kept).
        """
        raise NotImplementedError

    def load(
        self,
        pieces: Longs,
        x: Longs,
        out: Floats,
        *,
        y: Floats | None = None,
        a: float = 1.0,
        z: Floats | None = None,
        b: float = 1.0,
        dtype: str = "float32",
        threads: int = 1,
    ) -> bool:
        """Write t of the dense pieces into `out`, (dense_numel,); as `select`."""
        raise NotImplementedError

    def write_values(self, bits: int, values: Floats, out: Bytes, threads: int = 1) -> None:
        """Fill `out`, exactly the format's bytes, with (n,) values of 2, 4, 16 or 32 bits."""
        raise NotImplementedError

    def read_values(self, bits: int, data: Bytes, values: Floats, threads: int = 1) -> Fault:
        """Fill (n,) `values` from what `write_values` made; after a fault with anything."""
        raise NotImplementedError

    def check_values(self, bits: int, data: Bytes, count: int) -> Fault:
        """What `read_values` would return; nothing is written."""
        raise NotImplementedError

    def write_places(self, places: Longs, indices: Shorts, out: Bytes, threads: int = 1) -> Fault:
        """Fill `out`, (places_bytes,), from (num_kept,) indices; after a fault with anything."""
        raise NotImplementedError

    def read_places(self, places: Longs, data: Bytes, indices: Shorts, threads: int = 1) -> Fault:
        """Fill (num_kept,) `indices` from arbitrary bytes; after a fault with anything."""
        raise NotImplementedError

    def check_places(self, places: Longs, data: Bytes, threads: int = 1) -> Fault:
        """What `read_places` would return; nothing is written."""
        raise NotImplementedError

    def scatter_add(
        self, rows: Longs, pieces: Longs, vector: Floats, block: Block, threads: int = 1
    ) -> None:
        """vector[position] += factor * value over a block; the product is rounded first.

        Args:
            rows: table.
            pieces: table.
            vector: (numel,) of the whole bucket.
            block: its factor must be given.
            threads: at most so many work at once.
        """
        raise NotImplementedError

    def touched_words(self, rows: Longs, pieces: Longs) -> int:
        """Elements of the `touched` of `move`: about numel / 64, the same for every k."""
        raise NotImplementedError

    def move(
        self,
        rows: Longs,
        pieces: Longs,
        own: Longs,
        own_dense: Longs,
        shared: Floats,
        touched: Words,
        blocks: Sequence[Block],
        *,
        close: bool,
        threads: int = 1,
    ) -> None:
        """Let the shared weights take blocks; own ones keep what they have beyond the shared ones.

        For every block in order and every element of it: at the first touch own -= shared; if it is
        the own block, own -= value; shared += factor * value, the product rounded first. At last,
        if asked for, own += shared wherever anything was touched. All other elements keep their
        bits. Blocks may come in one call or in several; one call with all of them reads every
        weight once and is the fastest.

        Args:
            rows: table.
            pieces: table.
            own: addresses of the runs' own weights, float32.
            own_dense: addresses of the pieces' own weights.
            shared: (numel,) of the whole bucket.
            touched: (touched_words,); zeros before the first call, and again after the last.
            blocks: see above; of one k.
            close: this is the last call.
            threads: at most so many work at once.
        """
        raise NotImplementedError

    def commit(
        self,
        rows: Longs,
        pieces: Longs,
        residual: Floats,
        gradient: Longs,
        gradient_dense: Longs,
        inverse_scale: float,
        block: Block | None,
        *,
        dtype: str = "float32",
        threads: int = 1,
    ) -> None:
        """residual += gradient * inverse_scale, then -= value * inverse_scale where sent.

        Products are rounded first.

        Args:
            rows: table; of any k if nothing was sent.
            pieces: table.
            residual: (numel,) of the whole bucket.
            gradient: addresses of the runs.
            gradient_dense: addresses of the pieces.
            inverse_scale: rounded to float32.
            block: what was sent, its factor and `sent` unused; None: nothing.
            dtype: of the gradient: "float32", "bfloat16" or "float16".
            threads: at most so many work at once.
        """
        raise NotImplementedError

    def checksum(self, array: Floats, start: int = 0, threads: int = 1) -> int:
        """Sum over all bits, each element's weight given by its position, modulo 2**64.

        Args:
            array: (n,).
            start: position of its first element; sums of parts add up to the sum of the whole.
            threads: at most so many work at once.
        """
        raise NotImplementedError


class RunLike(Protocol):
    """What `rows_table` reads of a run."""

    @property
    def bucket_start(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def row_numel(self) -> int: ...
    @property
    def row_kept(self) -> int: ...
    @property
    def kept_start(self) -> int: ...


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


def kernels() -> Kernels | None:
    """The kernels, built at the first call; None, with one warning, where that is impossible."""
    return None
