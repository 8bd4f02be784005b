"""Which implementation works on given memory: the native kernels, or the references beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ds_gradprune.bucket.layout import BucketLayout
from ds_gradprune.native import library
from ds_gradprune.native.library import Kernels, Longs


class Tables(NamedTuple):
    """What the kernels need to know of a layout at one k.

    Attributes:
        rows: table of the runs.
        pieces: table of the dense segments, one line each.
        row_segments: (runs,) the segment of every run.
        piece_segments: (dense segments,) the segment of every piece.
    """

    rows: Longs
    pieces: Longs
    row_segments: Longs
    piece_segments: Longs


def kernels_on(device: torch.device) -> Kernels | None:
    """The native kernels for CPU memory; None on accelerators and where they cannot be built."""
    return library.kernels() if device.type == "cpu" else None


def threads() -> int:
    """At most so many threads work at once: as many as torch's own operations take."""
    return torch.get_num_threads()


def tables(layout: BucketLayout, k: int) -> Tables:
    """The kernels' tables, kept with the layout."""
    return layout.derived(("tables", k), lambda: _tables(layout, k))


def addresses(
    parts: Sequence[torch.Tensor], layout: BucketLayout, table: Longs, segments: Longs
) -> Longs:
    """Where the lines of a table begin in memory.

    Args:
        parts: one tensor for the whole bucket, or one per segment; contiguous, on the CPU.
        layout: the bucket's layout.
        table: rows or pieces; its first column counts from the start of the bucket.
        segments: the segment of every line.

    Returns:
        (lines,) int64.
    """
    if not len(table):
        return segments
    nbytes = parts[0].element_size()
    if len(parts) == 1:
        return parts[0].data_ptr() + nbytes * table[:, 0]
    offsets = [segment.offset for segment in layout.segments]
    origins = [
        part.data_ptr() - nbytes * offset for part, offset in zip(parts, offsets, strict=True)
    ]
    found: Longs = np.array(origins, dtype=np.int64)[segments] + nbytes * table[:, 0]
    return found


def _tables(layout: BucketLayout, k: int) -> Tables:
    runs = layout.runs(k)
    dense = [(n, s) for n, s in enumerate(layout.segments) if not s.pruned]
    return Tables(
        library.rows_table(runs),
        library.pieces_table((s.offset, s.numel) for _, s in dense),
        np.array([run.segment for run in runs], dtype=np.int64),
        np.array([number for number, _ in dense], dtype=np.int64),
    )
