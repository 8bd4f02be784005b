"""The library's functions as ctypes sees them, and arrays as pointers. For `library` alone."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ds_gradprune.native.tables import Block, Floats, Longs

KINDS = {"float32": 0, "bfloat16": 1, "float16": 2}
_ADD, _SENT = 1, 2


class CBlock(ctypes.Structure):
    """A `Block` as the library reads it."""

    _fields_ = (
        ("indices", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("flags", ctypes.c_int64),
        ("factor", ctypes.c_float),
    )


_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_TABLE = (_POINTER, _LONG)
_SOURCE = (_POINTER, _INT, _POINTER, _FLOAT, _POINTER, _FLOAT)
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "gp_select": (_INT, (*_TABLE, *_SOURCE, _POINTER, _POINTER, _INT)),
    "gp_load": (_INT, (*_TABLE, *_SOURCE, _POINTER, _INT)),
    "gp_write_values": (None, (_INT, _POINTER, _LONG, _POINTER, _INT)),
    "gp_read_values": (_INT, (_INT, _POINTER, _LONG, _POINTER, _INT)),
    "gp_check_values": (_INT, (_INT, _POINTER, _LONG)),
    "gp_write_places": (_INT, (*_TABLE, _POINTER, _POINTER, _INT)),
    "gp_read_places": (_INT, (*_TABLE, _POINTER, _POINTER, _INT)),
    "gp_places_bytes": (_LONG, _TABLE),
    "gp_scatter_add": (None, (*_TABLE, *_TABLE, _POINTER, _POINTER, _INT)),
    "gp_touched_words": (_LONG, (*_TABLE, *_TABLE)),
    "gp_move": (
        None,
        (*_TABLE, *_TABLE, *(_POINTER,) * 4, _POINTER, _LONG, _INT, _INT),
    ),
    "gp_checksum": (ctypes.c_uint64, (_POINTER, _LONG, ctypes.c_uint64, _INT)),
}


def load(path: Path) -> ctypes.CDLL:
    """The library, with the types of its functions.

    Raises:
        OSError: it cannot be loaded.
    """
    library = ctypes.CDLL(str(path.resolve()))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def pointer(array: npt.NDArray[Any], dtype: npt.DTypeLike, size: int | None = None) -> int:
    """Where a contiguous array begins.

    Raises:
        ValueError: it is not as said.
    """
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(
            f"array must be contiguous {np.dtype(dtype)}, got {array.dtype} with strides "
            f"{array.strides}."
        )
    if size is not None and array.size != size:
        raise ValueError(f"array of {array.dtype} must have {size} elements, got {array.size}.")
    return int(array.__array_interface__["data"][0])


def table(table: Longs, columns: int) -> tuple[int, int]:
    """Pointer and number of lines."""
    return pointer(table, np.int64, len(table) * columns), len(table)


def source(
    lines: int, x: Longs, y: Floats | None, a: float, z: Floats | None, b: float, dtype: str
) -> tuple[int | float | None, ...]:
    """What `select` and `load` read."""
    if dtype not in KINDS:
        raise ValueError(f"dtype must be one of {list(KINDS)}, got {dtype!r}.")
    y_at, z_at = (None if array is None else pointer(array, np.float32) for array in (y, z))
    return pointer(x, np.int64, lines), KINDS[dtype], y_at, a, z_at, b


def num_kept(rows: Longs) -> int:
    """Kept elements of a table of rows."""
    return int(rows[-1, 4] + rows[-1, 1] * rows[-1, 3]) if len(rows) else 0


def blocks_of(rows: Longs, pieces: Longs, blocks: Sequence[Block]) -> ctypes.Array[CBlock]:
    """Blocks as the library reads them; it keeps no array alive."""
    kept, dense = num_kept(rows), int(pieces[:, 1].sum())
    return (CBlock * len(blocks))(
        *(
            CBlock(
                pointer(block.indices, np.int16, kept),
                pointer(block.values, np.float32, kept),
                pointer(block.dense, np.float32, dense),
                _SENT * block.sent + _ADD * (block.factor is not None),
                block.factor or 0.0,
            )
            for block in blocks
        )
    )


def values_bytes(bits: int, count: int) -> int:
    """Bytes of so many values; a block of 128 of up to 4 bits begins with 4."""
    if bits not in (2, 4, 16, 32):
        raise ValueError(f"bits must be 2, 4, 16 or 32, got {bits}.")
    return -(-count * bits // 8) + (-(-count // 128) * 4 if bits <= 4 else 0)


def num_places(places: Longs) -> int:
    """Kept elements of a table of places."""
    return int((places[:, 1] * places[:, 5]).sum())
