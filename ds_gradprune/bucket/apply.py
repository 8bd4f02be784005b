"""What a delivered block does to a vector, and to the two copies of an island's weights.

Every product is rounded to float32 before it is added, so the bits are the same on every device.
All functions are local; nothing as large as a block is allocated. `apply_torch` is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.autograd.graph import increment_version

from ds_gradprune.bucket import apply_device, apply_torch
from ds_gradprune.bucket.block import SparseBlock, check_block
from ds_gradprune.bucket.dispatch import addresses, kernels_on, tables, threads
from ds_gradprune.bucket.layout import BucketLayout
from ds_gradprune.native import accelerator
from ds_gradprune.native.library import Block, Kernels, Words


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
    numel = block.layout.numel
    if vector.shape != (numel,):
        raise ValueError(f"vector must have shape ({numel},), got {tuple(vector.shape)}.")
    _check_device(block, vector.device)
    plain = vector.dtype is torch.float32 and vector.is_contiguous()
    if plain and accelerator.is_on(vector.device):
        apply_device.scatter_add(vector.detach(), block, factor)
        increment_version(vector)
        return
    native = kernels_on(vector.device)
    if native is None or not plain:
        apply_torch.scatter_add(vector, block, factor)
        return
    rows, pieces, *_ = tables(block.layout, block.k)
    native.scatter_add(rows, pieces, vector.detach().numpy(), _plain(block, factor), threads())
    increment_version(vector)


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
        _check_weights(own, shared, layout)
        parts, flat = [tensor.detach() for tensor in own], shared.detach()
        self._layout = layout
        self._device = shared.device
        native = kernels_on(shared.device)
        self._how: _NativeMove | apply_torch.TorchMove | apply_device.DeviceMove
        if accelerator.is_on(shared.device):
            self._how = apply_device.DeviceMove(parts, flat, layout)
        elif native is None:
            self._how = apply_torch.TorchMove(parts, flat, layout)
        else:
            self._how = _NativeMove(native, parts, flat, layout)

    @torch.no_grad()
    def sent(self, block: SparseBlock) -> None:
        """Take what this island has sent from its progress: beyond -= block.

        Args:
            block: exactly as every receiver reads it.

        Raises:
            ValueError: the block is of another layout or device.
        """
        self._check(block)
        self._how.sent(block)

    @torch.no_grad()
    def add(self, block: SparseBlock, factor: float, *, is_own: bool = False) -> None:
        """Let the shared weights take a delivery: shared += factor * block.

        Args:
            block: what one island has sent, this one included.
            factor: weight of one island's progress; equal on all islands.
            is_own: this island has sent it, so `sent(block)` belongs to it; both in one pass.

        Raises:
            ValueError: the block is of another layout or device.
        """
        self._check(block)
        self._how.add(block, factor, is_own)

    @torch.no_grad()
    def close(self) -> None:
        """Put the own weights where they belong: own = shared + beyond. The move is over."""
        self._how.close()

    def _check(self, block: SparseBlock) -> None:
        if block.layout is not self._layout:
            raise ValueError(f"block must be of {self._layout}, got {block.layout}.")
        _check_device(block, self._device)


def move_at_once(
    own: Sequence[torch.Tensor],
    shared: torch.Tensor,
    blocks: Sequence[SparseBlock],
    *,
    rank: int,
    factor: float,
) -> None:
    """`Move` with all deliveries in memory: the same bits in one pass over the weights.

    On CPUs it takes a tenth of the time of a `Move`, which reads the weights once per delivery. It
    suits few islands and low densities: a block takes 6 bytes per kept element.

    Args:
        own: as for `Move`.
        shared: as for `Move`.
        blocks: what each island sent, in rank order, of one layout and one k.
        rank: the number of this island in `blocks`.
        factor: weight of one island's progress; equal on all islands.

    Raises:
        ValueError: a shape, a dtype, a device, the rank or a block is wrong.
    """
    if not 0 <= rank < len(blocks):
        raise ValueError(f"rank must be in 0 .. {len(blocks) - 1}, got {rank}.")
    layout, k = blocks[0].layout, blocks[0].k
    for block in blocks:
        if block.layout is not layout or block.k != k:
            raise ValueError(
                f"blocks must all be of {layout} at k = {k}, got {block.layout} at k = {block.k}."
            )
        _check_device(block, shared.device)
    native = kernels_on(shared.device)
    if accelerator.is_on(shared.device):
        _check_weights(own, shared, layout)
        parts = [tensor.detach() for tensor in own]
        if apply_device.move_at_once(parts, shared.detach(), blocks, rank, factor):
            return
    elif native is not None:
        _check_weights(own, shared, layout)
        given = [_plain(block, factor, sent=i == rank) for i, block in enumerate(blocks)]
        flat = shared.detach()
        _native_move(native, own, flat, layout, k, None, given, close=True)
        return
    move = Move(own, shared, layout)
    for number, block in enumerate(blocks):
        move.add(block, factor, is_own=number == rank)
    move.close()


@torch.no_grad()
def take_at_once(own: Sequence[torch.Tensor], shared: torch.Tensor, block: SparseBlock) -> None:
    """The own weights alone lose a block: the bits of a `Move` with `sent`, in one pass on CPUs.

    Args:
        own: as for `Move`.
        shared: as for `Move`, but it stays.
        block: of their layout.

    Raises:
        ValueError: a shape, a dtype or a device is wrong.
    """
    native = None if accelerator.is_on(shared.device) else kernels_on(shared.device)
    if native is None:
        move = Move(own, shared, block.layout)
        move.sent(block)
        move.close()
        return
    _check_device(block, shared.device)
    _check_weights(own, shared, block.layout)
    given, flat = [_plain(block, None, sent=True)], shared.detach()
    _native_move(native, own, flat, block.layout, block.k, None, given, close=True)


class _NativeMove:
    """`Move` by the kernels: one bit per element notes what has been touched."""

    def __init__(
        self,
        native: Kernels,
        own: Sequence[torch.Tensor],
        shared: torch.Tensor,
        layout: BucketLayout,
    ) -> None:
        self._native = native
        self._own = own
        self._shared = shared
        self._layout = layout
        self._k = 1
        rows, pieces, *_ = tables(layout, self._k)
        self._touched = np.zeros(native.touched_words(rows, pieces), dtype=np.uint64)

    def sent(self, block: SparseBlock) -> None:
        """Beyond -= block."""
        self._k = block.k
        self._move([_plain(block, None, sent=True)])

    def add(self, block: SparseBlock, factor: float, is_own: bool) -> None:
        """Shared += factor * block; beyond -= block, if it is the own one."""
        self._k = block.k
        self._move([_plain(block, factor, sent=is_own)])

    def close(self) -> None:
        """Own = shared + beyond."""
        self._move([], close=True)

    def _move(self, blocks: Sequence[Block], *, close: bool = False) -> None:
        _native_move(
            self._native, self._own, self._shared, self._layout, self._k, self._touched, blocks,
            close=close,
        )  # fmt: skip


def _native_move(
    native: Kernels,
    own: Sequence[torch.Tensor],
    shared: torch.Tensor,
    layout: BucketLayout,
    k: int,
    touched: Words | None,
    blocks: Sequence[Block],
    *,
    close: bool,
) -> None:
    rows, pieces, row_segments, piece_segments = tables(layout, k)
    native.move(
        rows,
        pieces,
        addresses(own, layout, rows, row_segments),
        addresses(own, layout, pieces, piece_segments),
        shared.numpy(),
        touched,
        blocks,
        close=close,
        threads=threads(),
    )
    increment_version([shared, *own])  # autograd must not take the weights for unchanged


def _plain(block: SparseBlock, factor: float | None, *, sent: bool = False) -> Block:
    """The block as the kernels take it."""
    return Block(block.indices.numpy(), block.values.numpy(), block.dense.numpy(), factor, sent)


def _check_device(block: SparseBlock, device: torch.device) -> None:
    check_block(block)
    if block.device != device:
        raise ValueError(f"block must be on {device}, got {block.device}.")


def _check_weights(own: Sequence[torch.Tensor], shared: torch.Tensor, layout: BucketLayout) -> None:
    if len(own) != len(layout.segments):
        raise ValueError(
            f"own must have one tensor for each of {len(layout.segments)} segments, got {len(own)}."
        )
    sizes = [segment.numel for segment in layout.segments]
    for name, tensor, numel in (
        ("shared", shared, layout.numel),
        *((f"own[{n}]", t, size) for n, (t, size) in enumerate(zip(own, sizes, strict=True))),
    ):
        if tensor.shape != (numel,) or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous with shape ({numel},), got {tuple(tensor.shape)}."
            )
        if tensor.dtype is not torch.float32:
            raise ValueError(f"{name} must be float32, got {tensor.dtype}.")
        if tensor.device != shared.device:
            raise ValueError(f"{name} must be on {shared.device}, got {tensor.device}.")
