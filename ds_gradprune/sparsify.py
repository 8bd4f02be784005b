"""Chunk-wise top-k: which elements of a flat vector are kept, and where they lie.

Knows nothing of bytes, ranks or error feedback. All functions are local.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ds_gradprune.records import CHUNK_NUMEL, BucketLayout, Segment, SparseBlock
from ds_gradprune.rows import Run, num_kept, runs
from ds_gradprune.topk import CpuTopK, top_k

__all__ = ["dense_positions", "kept_positions", "layout_of", "select"]

_CPU_BLOCK_ROWS = 64
"""Rows worked on at a time: two scratch arrays of 1 MiB stay in or near a core's L2 cache."""

_DEVICE_BLOCK_ROWS = 1024
"""The same on an accelerator: large enough to fill it, small beside a model."""

_Pick = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def layout_of(shapes: Sequence[torch.Size], min_numel: int) -> BucketLayout:
    """Lay tensors one after the other into a bucket.

    Args:
        shapes: the tensors' shapes, in the bucket's order; empty tensors are allowed.
        min_numel: tensors with fewer elements are sent whole, as are those of 0 or 1 dimensions
            (biases, norms: few bytes, and every element counts).

    Returns:
        A layout with one segment per tensor.
    """
    segments, offset = [], 0
    for shape in shapes:
        numel = math.prod(shape)
        segments.append(Segment(offset, numel, pruned=len(shape) > 1 and numel >= min_numel))
        offset += numel
    return BucketLayout(tuple(segments), offset)


@functools.lru_cache(maxsize=16)
def dense_positions(layout: BucketLayout) -> torch.Tensor:
    """Where `SparseBlock.dense` lies in the bucket.

    Returns:
        (layout.dense_numel,) int64, CPU, ascending; cached, so not to be changed.
    """
    ranges = [torch.arange(start, start + numel) for start, numel in _dense_runs(layout)]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)


def kept_positions(layout: BucketLayout, k: int, indices: torch.Tensor) -> torch.Tensor:
    """Turn positions inside rows into positions in the bucket.

    Args:
        layout: the bucket's layout.
        k: kept elements per full row.
        indices: (num_kept,) int16, as in `SparseBlock`; any device.

    Returns:
        (num_kept,) int64 on the same device, strictly ascending if `indices` are valid.

    Raises:
        ValueError: `indices` is not (num_kept,) for this layout and k, or k is out of range.
    """
    if indices.shape != (num_kept(layout, k),):
        raise ValueError(
            f"indices must have shape ({num_kept(layout, k)},), got {tuple(indices.shape)}."
        )
    positions = torch.empty(indices.shape, dtype=torch.int64, device=indices.device)
    for start, shape, bases in _row_bases(layout, k):
        stop = start + shape[0] * shape[1]
        torch.add(
            indices[start:stop].view(shape),
            bases.to(indices.device),
            out=positions[start:stop].view(shape),
        )
    return positions


@torch.no_grad()
def select(
    vector: torch.Tensor,
    layout: BucketLayout,
    k: int,
    *,
    addend: torch.Tensor | None = None,
    scale: float = 1.0,
) -> SparseBlock:
    """Keep the k largest magnitudes of every row of t = vector + scale * addend.

    Exact: no dropped element of a row is larger in magnitude than a kept one; of equal magnitudes
    (0.0 and -0.0 are equal) the lowest index is kept. t is the float32 nearest to the sum, if
    `scale` is a power of two; it exists in blocks of rows only. Inputs are not changed. Infinities
    and NaN count as larger than every number, so a row that holds some has some picked.

    Args:
        vector: (layout.numel,) float32, bfloat16 or float16, contiguous; the gradient.
        layout: the bucket's layout.
        k: kept elements per full row, 1 .. CHUNK_NUMEL; a row of n < CHUNK_NUMEL elements keeps
            ceil(k * n / CHUNK_NUMEL).
        addend: (layout.numel,) float32 on the same device, the residual; None: nothing is added.
        scale: factor of `addend`: the loss scale of `vector`; powers of two cost no rounding.

    Returns:
        A block whose tensors are new and on the device of `vector`; dense segments hold all of t.

    Raises:
        ValueError: k, a shape or a dtype is not as said above.

    References:
        Chunk-wise selection: Peng et al., "DeMo: Decoupled Momentum Optimization", 2024,
        arXiv 2411.19870, section 3; here without a transform.
    """
    _check(vector, layout, addend)
    device = vector.device
    kept = num_kept(layout, k)
    block = SparseBlock(
        layout,
        k,
        indices=torch.empty(kept, dtype=torch.int16, device=device),
        values=torch.empty(kept, dtype=torch.float32, device=device),
        dense=torch.empty(layout.dense_numel, dtype=torch.float32, device=device),
    )
    source = _Source(vector, addend, scale)
    dense_start = 0
    for bucket_start, numel in _dense_runs(layout):
        source.load(bucket_start, block.dense[dense_start : dense_start + numel])
        dense_start += numel
    for run in runs(layout, k):
        if run.row_kept == run.row_numel:
            _keep_all(run, source, block)
    pruned = [run for run in runs(layout, k) if run.row_kept < run.row_numel]
    if device.type == "cpu":
        pick = CpuTopK(_CPU_BLOCK_ROWS * CHUNK_NUMEL)
        _prune(_blocks(pruned, _CPU_BLOCK_ROWS), pick, source, block)
    else:
        _prune(_blocks(pruned, _DEVICE_BLOCK_ROWS), top_k, source, block)
    return block


class _Source:
    """t = vector + scale * addend, computed where it is asked for; see `select`."""

    def __init__(self, vector: torch.Tensor, addend: torch.Tensor | None, scale: float) -> None:
        self._vector = vector
        self._addend = addend
        self._scale = scale
        is_plain = vector.device.type == "cpu" and vector.dtype is torch.float32
        self._array = vector.numpy() if is_plain else None

    def load(self, start: int, out: torch.Tensor) -> None:
        """Write t[start : start + out.numel()] into `out`, (numel,) float32, contiguous."""
        stop = start + out.numel()
        if self._array is not None:  # numpy: a third of torch's overhead per call
            part, filled = self._array[start:stop], out.numpy()
            if self._addend is None:
                filled[:] = part
            elif self._scale == 1.0:
                np.add(part, self._addend.numpy()[start:stop], out=filled)
            else:
                np.multiply(self._addend.numpy()[start:stop], self._scale, out=filled)
                np.add(part, filled, out=filled)
            return
        out.copy_(self._vector[start:stop])
        if self._addend is not None:
            out.add_(self._addend[start:stop], alpha=self._scale)


def _check(vector: torch.Tensor, layout: BucketLayout, addend: torch.Tensor | None) -> None:
    if vector.shape != (layout.numel,) or not vector.is_contiguous():
        raise ValueError(
            f"vector must be contiguous with shape ({layout.numel},), got {tuple(vector.shape)}."
        )
    if vector.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"vector must be float32, bfloat16 or float16, got {vector.dtype}.")
    if addend is None:
        return
    if addend.shape != vector.shape or addend.dtype is not torch.float32:
        raise ValueError(
            f"addend must be float32 with shape ({layout.numel},), got {addend.dtype} "
            f"{tuple(addend.shape)}."
        )
    if addend.device != vector.device:
        raise ValueError(f"addend must be on {vector.device}, got {addend.device}.")


@functools.lru_cache(maxsize=64)
def _dense_runs(layout: BucketLayout) -> tuple[tuple[int, int], ...]:
    """(first element, number of elements) of the dense segments; neighbours are taken together."""
    runs: list[tuple[int, int]] = []
    for segment in layout.segments:
        if segment.pruned or not segment.numel:
            continue
        if runs and sum(runs[-1]) == segment.offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + segment.numel)
        else:
            runs.append((segment.offset, segment.numel))
    return tuple(runs)


@functools.lru_cache(maxsize=32)
def _row_bases(
    layout: BucketLayout, k: int
) -> tuple[tuple[int, tuple[int, int], torch.Tensor], ...]:
    """(first kept element, (rows, kept per row), (rows, 1) int64 bucket positions of the rows).

    Rows that keep equally many and follow each other among the kept are one entry, wherever they
    lie in the bucket: without tails there is one entry.
    """
    groups: list[list[Run]] = []
    for run in runs(layout, k):
        if groups and groups[-1][0].row_kept == run.row_kept:
            groups[-1].append(run)
        else:
            groups.append([run])
    entries = []
    for group in groups:
        bases = torch.cat(
            [
                run.bucket_start + run.row_numel * torch.arange(run.num_rows, dtype=torch.int64)
                for run in group
            ]
        )
        shape = (len(bases), group[0].row_kept)
        entries.append((group[0].kept_start, shape, bases.unsqueeze(1)))
    return tuple(entries)


def _keep_all(run: Run, source: _Source, block: SparseBlock) -> None:
    """Rows of which every element is kept: a copy."""
    kept = slice(run.kept_start, run.kept_stop)
    source.load(run.bucket_start, block.values[kept])
    order = torch.arange(run.row_numel, dtype=torch.int16, device=block.indices.device)
    block.indices[kept].view(run.num_rows, run.row_numel).copy_(order)


def _prune(blocks: list[list[Run]], pick: _Pick, source: _Source, block: SparseBlock) -> None:
    """Fill scratch memory with rows of equal length and pick from it, block after block."""
    if not blocks:
        return
    numel = max(sum(piece.num_rows * piece.row_numel for piece in pieces) for pieces in blocks)
    scratch = torch.empty(numel, dtype=torch.float32, device=block.values.device)
    for pieces in blocks:
        row_numel, row_kept = pieces[0].row_numel, pieces[0].row_kept
        filled = 0
        for piece in pieces:
            stop = filled + piece.num_rows * row_numel
            source.load(piece.bucket_start, scratch[filled:stop])
            filled = stop
        kept = slice(pieces[0].kept_start, pieces[-1].kept_stop)
        pick(
            scratch[:filled].view(-1, row_numel),
            block.indices[kept].view(-1, row_kept),
            block.values[kept].view(-1, row_kept),
        )


def _blocks(runs: list[Run], block_rows: int) -> list[list[Run]]:
    """Cut runs into blocks of at most `block_rows` rows of one length.

    A block may gather rows from many places of the bucket; its kept elements lie together.
    """
    blocks: list[list[Run]] = []
    room = 0
    for run in runs:
        last = blocks[-1][-1] if blocks else run
        if last.kept_stop != run.kept_start or last.row_numel != run.row_numel:
            room = 0
        start = 0
        while start < run.num_rows:
            if not room:
                blocks.append([])
                room = block_rows
            stop = min(run.num_rows, start + room)
            blocks[-1].append(run.rows(start, stop))
            room -= stop - start
            start = stop
    return blocks
