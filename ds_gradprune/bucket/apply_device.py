"""`apply` by the accelerator's kernels, with the same bits. Arguments have been checked there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.autograd.graph import increment_version

from ds_gradprune.bucket import device as tables_on
from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.bucket.layout import BucketLayout
from ds_gradprune.native import accelerator

if TYPE_CHECKING:
    from ds_gradprune.native.device.rows import Rows


def scatter_add(vector: torch.Tensor, block: SparseBlock, factor: float) -> None:
    """Add factor times the block to a contiguous float32 vector of the whole bucket."""
    from ds_gradprune.native.device import apply

    with accelerator.at(block.device):
        for rows, starts, k, values in _parts(block):
            apply.scatter_add(vector, rows, starts, k, block.indices, values, factor)


class DeviceMove:
    """What `Move` does; a byte per element notes what has been touched.

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
        self._touched = torch.zeros(layout.numel, dtype=torch.int8, device=shared.device)

    def sent(self, block: SparseBlock) -> None:
        """Beyond -= block."""
        self._move(block, None, sent=True)

    def add(self, block: SparseBlock, factor: float, is_own: bool) -> None:
        """Shared += factor * block; beyond -= block, if it is the own one."""
        self._move(block, factor, sent=is_own)

    def close(self) -> None:
        """Own = shared + beyond."""
        if not self._layout.numel:
            return
        from ds_gradprune.native.device import apply

        device = self._shared.device
        own = tables_on.memory(self._own, self._layout, whole=False)
        with accelerator.at(device):
            for rows, _ in (
                *tables_on.pruned(self._layout, 1, device),
                *tables_on.dense(self._layout, device),
            ):
                apply.close_rows(own, self._shared, self._touched, rows)
        increment_version([self._shared, *self._own])

    def _move(self, block: SparseBlock, factor: float | None, *, sent: bool) -> None:
        if not self._layout.numel:
            return
        from ds_gradprune.native.device import apply

        own = tables_on.memory(self._own, self._layout, whole=False)
        with accelerator.at(block.device):
            for rows, starts, k, values in _parts(block):
                apply.move_block(
                    own, self._shared, self._touched, rows, starts, k, block.indices, values,
                    factor, sent=sent,
                )  # fmt: skip
        increment_version([self._shared, *self._own])  # autograd must not take them for unchanged


def move_at_once(
    own: Sequence[torch.Tensor],
    shared: torch.Tensor,
    blocks: Sequence[SparseBlock],
    rank: int,
    factor: float,
) -> bool:
    """`apply.move_at_once`; False, and nothing is done, where the blocks are too many."""
    from ds_gradprune.native.device import apply

    first = blocks[0]
    if len(blocks) > apply.MAX_AT_ONCE or not first.layout.numel:
        return not first.layout.numel
    memory = tables_on.memory(own, first.layout, whole=False)
    table = tables_on.addresses(
        [t.data_ptr() for block in blocks for t in (block.indices, block.values, block.dense)],
        first.layout,
        first.device,
    ).view(-1, 3)
    with accelerator.at(first.device):
        for rows, starts, k, _ in _parts(first):
            apply.move_at_once(memory, shared, rows, starts, k, table, rank, factor)
    increment_version([shared, *own])
    return True


def _parts(
    block: SparseBlock,
) -> Iterator[tuple[Rows, torch.Tensor, int | None, torch.Tensor]]:
    """Rows, where their values begin, k or None for dense ones, and the values."""
    layout, device = block.layout, block.device
    for rows, starts in tables_on.pruned(layout, block.k, device):
        yield rows, starts, block.k, block.values
    for rows, starts in tables_on.dense(layout, device):
        yield rows, starts, None, block.dense
