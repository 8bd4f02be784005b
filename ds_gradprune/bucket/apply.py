"""What a delivered block does to a vector, and to the two copies of an island's weights.

Every product is rounded to float32 before it is added, so the bits are the same on every device.
All functions are local; nothing as large as a block is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ds_gradprune.bucket.block import SparseBlock, check_block
from ds_gradprune.bucket.layout import BucketLayout

_CPU_SPAN_NUMEL = 1 << 16
"""Elements worked on at a time: 8 bytes each for their positions, 4 for a product."""

_DEVICE_SPAN_NUMEL = 1 << 22
"""The same on an accelerator: large enough to fill it, small beside a model."""


@torch.no_grad()
def scatter_add(vector: torch.Tensor, block: SparseBlock, factor: float = 1.0) -> None:
    """Add factor times the block: vector[p] += factor * value, at every position it carries.

    Args:
        vector: (layout.numel,) floating point on the block's device; changed in place. With a dtype
            other than float32 the product is rounded to it before the sum.
        block: what to add.
        factor: rounded to float32, as is its product with a value.

    Raises:
        ValueError: a shape or a device is wrong.
    """
    _check_vector("vector", vector, block.layout)
    _check_device(block, vector.device)
    for segment, kept, positions in _spans(block):
        origin = block.layout.segments[segment].offset
        product = block.values[kept].mul(factor).to(vector.dtype)
        vector.index_add_(0, positions.add_(origin), product)
    for segment, start, dense in _dense_spans(block):
        origin = block.layout.segments[segment].offset + start
        vector[origin : origin + dense.numel()].add_(dense.mul(factor).to(vector.dtype))


class Move:
    """One exchange's move of the shared weights, and of the own weights after them.

    The shared weights take every delivery. The own weights keep what they have beyond the shared
    ones, less what was sent of it. With `shared` before the exchange::

        beyond = own - shared                  where an element is first sent or delivered
        sent(block)          beyond -= block
        add(block, factor)   shared += factor * block
        close()              own = shared + beyond

    Elements that no block holds keep their bits in both. Until `close` the own weights hold
    `beyond` at the others, so a move must not be left half done.

    Args:
        own: the island's weights, one (segment.numel,) contiguous float32 tensor per segment;
            changed in place.
        shared: (layout.numel,) float32 on the same device; changed in place.
        layout: what lies where in the bucket.

    Raises:
        ValueError: a shape, a dtype or a device is wrong.
    """

    def __init__(
        self, own: Sequence[torch.Tensor], shared: torch.Tensor, layout: BucketLayout
    ) -> None:
        _check_vector("shared", shared, layout)
        if len(own) != len(layout.segments):
            raise ValueError(
                f"own must have one tensor for each of {len(layout.segments)} segments, got "
                f"{len(own)}."
            )
        for number, (tensor, segment) in enumerate(zip(own, layout.segments, strict=True)):
            _check_weights(f"own[{number}]", tensor, segment.numel, shared.device)
        _check_weights("shared", shared, layout.numel, shared.device)
        self._own = [tensor.detach() for tensor in own]
        self._shared = shared.detach()
        self._layout = layout
        self._touched = torch.zeros(layout.numel, dtype=torch.bool, device=shared.device)
        self._dense_touched = False

    @torch.no_grad()
    def sent(self, block: SparseBlock) -> None:
        """Take what this island has sent from its progress: beyond -= block.

        Args:
            block: exactly as every receiver reads it.

        Raises:
            ValueError: the block is of another layout or device.
        """
        self._check(block)
        for segment, kept, positions in _spans(block):
            beyond = self._beyond(segment, positions)
            beyond.sub_(block.values[kept])
            self._own[segment].index_copy_(0, positions, beyond)
        for segment, start, dense in self._dense(block):
            self._own[segment][start : start + dense.numel()].sub_(dense)

    @torch.no_grad()
    def add(self, block: SparseBlock, factor: float) -> None:
        """Let the shared weights take a delivery: shared += factor * block.

        Args:
            block: what one island has sent, this one included.
            factor: weight of one island's progress; equal on all islands.

        Raises:
            ValueError: the block is of another layout or device.
        """
        self._check(block)
        for segment, _, positions in _spans(block):
            self._own[segment].index_copy_(0, positions, self._beyond(segment, positions))
        for _ in self._dense(block):
            pass
        scatter_add(self._shared, block, factor)

    @torch.no_grad()
    def close(self) -> None:
        """Put the own weights where they belong: own = shared + beyond. The move is over."""
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

    def _check(self, block: SparseBlock) -> None:
        if block.layout is not self._layout:
            raise ValueError(f"block must be of {self._layout}, got {block.layout}.")
        _check_device(block, self._shared.device)


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


def _check_vector(name: str, vector: torch.Tensor, layout: BucketLayout) -> None:
    if vector.shape != (layout.numel,):
        raise ValueError(f"{name} must have shape ({layout.numel},), got {tuple(vector.shape)}.")


def _check_device(block: SparseBlock, device: torch.device) -> None:
    check_block(block)
    if block.device != device:
        raise ValueError(f"block must be on {device}, got {block.device}.")


def _check_weights(name: str, tensor: torch.Tensor, numel: int, device: torch.device) -> None:
    if tensor.shape != (numel,) or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous with shape ({numel},), got {tuple(tensor.shape)}."
        )
    if tensor.dtype is not torch.float32:
        raise ValueError(f"{name} must be float32, got {tensor.dtype}.")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}.")
