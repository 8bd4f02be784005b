"""The kernels as Python functions: numpy arrays and addresses in, nothing allocated per call.

`tables` says how memory is described. `kernels` gives the functions where they can be had.

Longer than 300 lines: one wrapper per kernel, all over the same tables.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ds_gradprune.native.abi import (
    blocks_of,
    load,
    num_kept,
    num_places,
    pointer,
    source,
    table,
    values_bytes,
)
from ds_gradprune.native.build import BuildError, build
from ds_gradprune.native.tables import (
    Block,
    Bytes,
    Fault,
    Floats,
    Longs,
    Shorts,
    Words,
    pieces_table,
    places_table,
    rows_table,
)

__all__ = [
    "Block",
    "Bytes",
    "Fault",
    "Floats",
    "Kernels",
    "Longs",
    "Shorts",
    "Words",
    "kernels",
    "pieces_table",
    "places_table",
    "rows_table",
]

_LOG = logging.getLogger(__name__)
_LOCK = threading.Lock()
"""Held while the library is built: threads of one process build and warn once."""


class Kernels:
    """The functions of one loaded library.

    All work on CPU memory and equal their numpy or torch references bit for bit, whatever `threads`
    is; the bits of nan results are not promised. They release the interpreter lock. Sizes and
    dtypes of arrays are checked; tables and addresses are believed.

    Args:
        path: the library's file.
    """

    def __init__(self, path: Path) -> None:
        self._call = load(path)

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
        kept = num_kept(rows)
        return bool(
            self._call.gp_select(
                *table(rows, 5),
                *source(len(rows), x, y, a, z, b, dtype),
                pointer(indices, np.int16, kept),
                pointer(values, np.float32, kept),
                threads,
            )
        )

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
        return bool(
            self._call.gp_load(
                *table(pieces, 2),
                *source(len(pieces), x, y, a, z, b, dtype),
                pointer(out, np.float32, int(pieces[:, 1].sum())),
                threads,
            )
        )

    def write_values(self, bits: int, values: Floats, out: Bytes, threads: int = 1) -> None:
        """Fill `out`, exactly the format's bytes, with (n,) values of 2, 4, 16 or 32 bits."""
        count, size = values.size, values_bytes(bits, values.size)
        self._call.gp_write_values(
            bits, pointer(values, np.float32), count, pointer(out, np.uint8, size), threads
        )

    def read_values(self, bits: int, data: Bytes, values: Floats, threads: int = 1) -> Fault:
        """Fill (n,) `values` from what `write_values` made; after a fault with anything."""
        count, size = values.size, values_bytes(bits, values.size)
        return Fault(
            self._call.gp_read_values(
                bits, pointer(data, np.uint8, size), count, pointer(values, np.float32), threads
            )
        )

    def check_values(self, bits: int, data: Bytes, count: int) -> Fault:
        """What `read_values` would return; nothing is written."""
        size = values_bytes(bits, count)
        return Fault(self._call.gp_check_values(bits, pointer(data, np.uint8, size), count))

    def write_places(self, places: Longs, indices: Shorts, out: Bytes, threads: int = 1) -> Fault:
        """Fill `out`, (places_bytes,), from (num_kept,) indices; after a fault with anything."""
        return Fault(
            self._call.gp_write_places(
                *table(places, 7),
                pointer(indices, np.int16, num_places(places)),
                pointer(out, np.uint8, self._places_bytes(places)),
                threads,
            )
        )

    def read_places(self, places: Longs, data: Bytes, indices: Shorts, threads: int = 1) -> Fault:
        """Fill (num_kept,) `indices` from arbitrary bytes; after a fault with anything."""
        return Fault(
            self._call.gp_read_places(
                *table(places, 7),
                pointer(data, np.uint8, self._places_bytes(places)),
                pointer(indices, np.int16, num_places(places)),
                threads,
            )
        )

    def check_places(self, places: Longs, data: Bytes, threads: int = 1) -> Fault:
        """What `read_places` would return; nothing is written."""
        where = pointer(data, np.uint8, self._places_bytes(places))
        return Fault(self._call.gp_read_places(*table(places, 7), where, None, threads))

    def scatter_add(
        self, rows: Longs, pieces: Longs, vector: Floats, block: Block, threads: int = 1
    ) -> None:
        """Add a block: vector[position] += factor * value; the product is rounded first.

        Args:
            rows: table.
            pieces: table.
            vector: (numel,) of the whole bucket.
            block: its factor must be given.
            threads: at most so many work at once.
        """
        self._call.gp_scatter_add(
            *table(rows, 5),
            *table(pieces, 2),
            pointer(vector, np.float32),
            blocks_of(rows, pieces, [block]),
            threads,
        )

    def touched_words(self, rows: Longs, pieces: Longs) -> int:
        """Elements of the `touched` of `move`: about numel / 64, the same for every k."""
        return int(self._call.gp_touched_words(*table(rows, 5), *table(pieces, 2)))

    def move(
        self,
        rows: Longs,
        pieces: Longs,
        own: Longs,
        own_dense: Longs,
        shared: Floats,
        touched: Words | None,
        blocks: Sequence[Block],
        *,
        close: bool,
        threads: int = 1,
    ) -> None:
        """Let the shared weights take blocks; own ones keep what they have beyond the shared ones.

        For every block in order and every element of it: at the first touch own -= shared; if it is
        the own block, own -= value; shared += factor * value, the product rounded first. At last,
        if asked for, own += shared wherever anything was touched. All other elements keep their
        bits. Blocks may come in several calls, or all in one, which reads every weight once and is
        two to three times as fast: `touched` may then be None, and one block at most the own one.

        Args:
            rows: table.
            pieces: table.
            own: addresses of the runs' own weights, float32.
            own_dense: addresses of the pieces' own weights.
            shared: (numel,) of the whole bucket.
            touched: (touched_words,); zeros before the first call, and again after the last. None:
                these are all blocks.
            blocks: see above; of one k.
            close: this is the last call.
            threads: at most so many work at once.
        """
        words = None
        if touched is not None:
            words = pointer(touched, np.uint64, self.touched_words(rows, pieces))
        elif not close:
            raise ValueError("close must be True where touched is None, got False.")
        self._call.gp_move(
            *table(rows, 5),
            *table(pieces, 2),
            pointer(own, np.int64, len(rows)),
            pointer(own_dense, np.int64, len(pieces)),
            pointer(shared, np.float32),
            words,
            blocks_of(rows, pieces, blocks),
            len(blocks),
            close,
            threads,
        )

    def checksum(self, array: Floats, start: int = 0, threads: int = 1) -> int:
        """Sum over all bits, each element's weight given by its position, modulo 2**64.

        Args:
            array: (n,).
            start: position of its first element; sums of parts add up to the sum of the whole.
            threads: at most so many work at once.
        """
        where = pointer(array, np.float32)
        return int(self._call.gp_checksum(where, array.size, start % 2**64, threads))

    def _places_bytes(self, places: Longs) -> int:
        return int(self._call.gp_places_bytes(*table(places, 7)))


def kernels() -> Kernels | None:
    """The kernels, built at the first call, which takes a few seconds; None: use the references.

    They are None if the variable DS_GRADPRUNE_NATIVE is 0, and where they cannot be built: then one
    warning says why.
    """
    with _LOCK:
        return _kernels()


@functools.cache
def _kernels() -> Kernels | None:
    if os.environ.get("DS_GRADPRUNE_NATIVE") == "0":
        return None
    try:
        return Kernels(build())
    except (BuildError, OSError) as error:
        _LOG.warning(
            "the native kernels are off, selection and coding take about ten times as long: %s. "
            "Install a C++ compiler (apt install g++) or set DS_GRADPRUNE_NATIVE=0.",
            error,
        )
        return None
