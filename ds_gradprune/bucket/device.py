"""Tables of a layout and views of tensors as the accelerator's kernels take them.

Nothing here is as large as a block: 32 bytes per row of 4096 elements with 8 for one k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ds_gradprune.bucket.layout import CHUNK_NUMEL, BucketLayout
from ds_gradprune.native.library import Longs

if TYPE_CHECKING:
    from ds_gradprune.native.device.rows import Memory, Rows, Source


Table: TypeAlias = "tuple[tuple[Rows, torch.Tensor], ...]"
"""Full rows and shorter ones, each with (rows,) int64: where their values begin in a block."""


def pruned(layout: BucketLayout, k: int, device: torch.device) -> Table:
    """The pruned rows, and the first kept element of each; kept with the layout."""

    def make() -> Table:
        numels = _lines(layout, pruned=True)[3]
        return _with_starts(rows, -(-k * numels // CHUNK_NUMEL), numels, device)

    rows = layout.derived(("device rows", device), lambda: _rows(layout, device, pruned=True))
    return layout.derived(("device kept", k, device), make)


def dense(layout: BucketLayout, device: torch.device) -> Table:
    """The dense segments, cut into rows like the pruned ones; where each begins in `dense`."""

    def make() -> Table:
        numels = _lines(layout, pruned=False)[3]
        return _with_starts(_rows(layout, device, pruned=False), numels, numels, device)

    return layout.derived(("device dense", device), make)


def addresses(numbers: Sequence[int], layout: BucketLayout, device: torch.device) -> torch.Tensor:
    """(n,) int64 on the device, kept with the layout: memory mostly stays where it is."""
    key = tuple(numbers)
    return layout.derived(
        ("device addresses", key, device),
        lambda: torch.tensor(key, dtype=torch.int64).to(device),
    )


def memory(parts: Sequence[torch.Tensor], layout: BucketLayout, *, whole: bool) -> Memory:
    """One tensor of the whole bucket, or one per segment, as the kernels take it."""
    from ds_gradprune.native.device.rows import memory_of

    if whole:
        return memory_of(parts, None)
    where = [part.data_ptr() for part in parts]
    return memory_of(parts, addresses(where, layout, parts[0].device))


def source(
    parts: Sequence[torch.Tensor],
    terms: Sequence[tuple[torch.Tensor, float]],
    layout: BucketLayout,
    *,
    whole: bool,
) -> Source:
    """The sum of a vector and up to two scaled terms as the kernels take it."""
    from ds_gradprune.native.device.rows import Source

    (y, a), (z, b) = [*terms, (None, 1.0), (None, 1.0)][:2]
    return Source(memory(parts, layout, whole=whole), y, a, z, b)


def _rows(layout: BucketLayout, device: torch.device, *, pruned: bool) -> tuple[Rows, Rows]:
    from ds_gradprune.native.device.rows import Rows

    lines = _lines(layout, pruned=pruned)
    is_full = lines[3] == CHUNK_NUMEL

    def those(chosen: npt.NDArray[np.bool_], *, full: bool) -> Rows:
        starts, insides, segments, numels = (column[chosen] for column in lines)
        aligned = not ((starts | insides) & 3).any()
        return Rows(
            torch.from_numpy(starts).to(device),
            torch.from_numpy(insides).to(device),
            torch.from_numpy(segments.astype(np.int32)).to(device),
            torch.from_numpy(numels.astype(np.int32)).to(device),
            4 if aligned else 1,
            full,
            len(starts),
        )

    return those(is_full, full=True), those(~is_full, full=False)


def _lines(layout: BucketLayout, *, pruned: bool) -> tuple[Longs, Longs, Longs, Longs]:
    """Start in the bucket and in the segment, segment and length of every row."""
    chosen = [number for number, s in enumerate(layout.segments) if s.pruned is pruned]
    offsets = np.array([layout.segments[number].offset for number in chosen], dtype=np.int64)
    sizes = np.array([layout.segments[number].numel for number in chosen], dtype=np.int64)
    counts = -(-sizes // CHUNK_NUMEL)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    insides = (np.arange(len(before), dtype=np.int64) - before) * CHUNK_NUMEL
    numels = np.minimum(np.repeat(sizes, counts) - insides, CHUNK_NUMEL)
    segments = np.repeat(np.array(chosen, dtype=np.int64), counts)
    return np.repeat(offsets, counts) + insides, insides, segments, numels


def _with_starts(
    rows: tuple[Rows, Rows], counts: Longs, numels: Longs, device: torch.device
) -> Table:
    """Beside full and shorter rows, what lies before every row."""
    before, is_full = np.cumsum(counts) - counts, numels == CHUNK_NUMEL
    full, short = (torch.from_numpy(before[chosen]).to(device) for chosen in (is_full, ~is_full))
    return (rows[0], full), (rows[1], short)
