"""The reference of `apply` in torch operations: for accelerators, and where no kernels are.

Arguments are as in `apply` and have been checked there. Works in pieces, so that nothing as large
as a block is allocated; every product is rounded before it is added. All functions are local.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.bucket.layout import BucketLayout

_CPU_SPAN_NUMEL = 1 << 16
"""Elements worked on at a time: 8 bytes each for their positions, 4 for a product."""

_DEVICE_SPAN_NUMEL = 1 << 22
"""The same on an accelerator: large enough to fill it, small beside a model."""


def scatter_add(vector: torch.Tensor, block: SparseBlock, factor: float) -> None:
    """Add factor times the block to a vector of the whole bucket."""
    for segment, kept, positions in _spans(block):
        origin = block.layout.segments[segment].offset
        # Not alpha=factor: whether that is one rounding or two depends on the processor.
        product = block.values[kept].mul(factor).to(vector.dtype)
        # Not index_add_: CUDA's atomics add 0.0 to a neighbour of 16 bits, and drop subnormals.
        total = vector.index_select(0, positions.add_(origin)).add_(product)
        vector.index_copy_(0, positions, total)
    for segment, start, dense in _dense_spans(block):
        origin = block.layout.segments[segment].offset + start
        vector[origin : origin + dense.numel()].add_(dense.mul(factor).to(vector.dtype))


class TorchMove:
    """What `Move` does. A bit per element would do; torch has a byte at least.

    Args:
        own: as for `Move`.
        shared: as for `Move`.
        layout: as for `Move`.
    """

    def __init__(
        self, own: Sequence[torch.Tensor], shared: torch.Tensor, layout: BucketLayout
    ) -> None:
        self._own = own
        self._shared = shared
        self._layout = layout
        self._touched = torch.zeros(layout.numel, dtype=torch.bool, device=shared.device)
        self._dense_touched = False

    def sent(self, block: SparseBlock) -> None:
        """Beyond -= block."""
        for segment, kept, positions in _spans(block):
            beyond = self._beyond(segment, positions)
            beyond.sub_(block.values[kept])
            self._own[segment].index_copy_(0, positions, beyond)
        for segment, start, dense in self._dense(block):
            self._own[segment][start : start + dense.numel()].sub_(dense)

    def add(self, block: SparseBlock, factor: float, is_own: bool) -> None:
        """Shared += factor * block; beyond -= block, if it is the own one."""
        if is_own:
            self.sent(block)
            scatter_add(self._shared, block, factor)
            return
        for segment, _, positions in _spans(block):
            self._own[segment].index_copy_(0, positions, self._beyond(segment, positions))
        for _ in self._dense(block):
            pass
        scatter_add(self._shared, block, factor)

    def close(self) -> None:
        """Own = shared + beyond."""
        step = _span_numel(self._shared.device)
        for segment, own in zip(self._layout.segments, self._own, strict=True):
            for start in range(0, segment.numel, step):
                stop = min(segment.numel, start + step)
                shared = self._shared[segment.offset + start : segment.offset + stop]
                part = own[start:stop]
                if not segment.pruned:
                    if self._dense_touched:
                        part.add_(shared)
                    continue
                touched = self._touched[segment.offset + start : segment.offset + stop]
                part.copy_(torch.where(touched, part + shared, part))

    def _beyond(self, segment: int, positions: torch.Tensor) -> torch.Tensor:
        """The own progress at positions of a segment; they count as touched from now on."""
        own = self._own[segment].index_select(0, positions)
        in_bucket = positions + self._layout.segments[segment].offset
        known = self._touched.index_select(0, in_bucket)
        before = self._shared.index_select(0, in_bucket).masked_fill_(known, 0.0)
        self._touched.index_fill_(0, in_bucket, True)
        return own.sub_(before)

    def _dense(self, block: SparseBlock) -> Iterator[tuple[int, int, torch.Tensor]]:
        """`_dense_spans`; the first time, own becomes own - shared there."""
        for segment, start, dense in _dense_spans(block):
            if not self._dense_touched:
                origin = self._layout.segments[segment].offset + start
                stop = start + dense.numel()
                self._own[segment][start:stop].sub_(self._shared[origin : origin + dense.numel()])
            yield segment, start, dense
        self._dense_touched = True


def _spans(block: SparseBlock) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """The kept elements in pieces: segment, where among the kept, (n,) int64 places in the segment.

    Positions are distinct inside a piece and the caller's to change.
    """
    device = block.device
    most = _span_numel(device)
    for run in block.layout.runs(block.k):
        first = run.bucket_start - block.layout.segments[run.segment].offset
        step = max(1, most // run.row_kept)
        for row in range(0, run.num_rows, step):
            part = run.rows(row, min(run.num_rows, row + step))
            kept = slice(part.kept_start, part.kept_stop)
            rows = torch.arange(row, row + part.num_rows, device=device).mul_(run.row_numel)
            places = block.indices[kept].view(part.num_rows, run.row_kept)
            yield run.segment, kept, (rows.add_(first)[:, None] + places).view(-1)


def _dense_spans(block: SparseBlock) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The dense elements in pieces: segment, first element in the segment, values."""
    most = _span_numel(block.device)
    done = 0
    for number, segment in enumerate(block.layout.segments):
        if segment.pruned:
            continue
        for start in range(0, segment.numel, most):
            stop = min(segment.numel, start + most)
            yield number, start, block.dense[done + start : done + stop]
        done += segment.numel


def _span_numel(device: torch.device) -> int:
    return _CPU_SPAN_NUMEL if device.type == "cpu" else _DEVICE_SPAN_NUMEL
