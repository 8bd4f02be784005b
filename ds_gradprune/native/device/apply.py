"""What blocks do to vectors and weights, on an accelerator, without atomics.

A block lists no place twice, and of several blocks that list one the first one's program writes
it, so no two programs write to one place. Every product is rounded before it is added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_gradprune.native.device.rows import MAX_ROW_NUMEL, Memory, Rows

MAX_AT_ONCE = 4
"""Blocks that `move_at_once` takes; every place of one is looked up in all others."""

_TILE = 512
"""Listed elements of a program, but one row at least."""


@triton.jit
def _tile(
    starts, numels, kept_starts, num_rows, k, ALL: tl.constexpr, R: tl.constexpr, KP: tl.constexpr
):  # fmt: skip
    """Rows of a program: their numbers, starts, first kept elements, and which are listed."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = rows < num_rows
    n = tl.load(numels + rows, mask=there, other=0)
    start = tl.load(starts + rows, mask=there, other=0)[:, None]
    first = tl.load(kept_starts + rows, mask=there, other=0)[:, None]
    m = n
    if not ALL:
        m = (n * k + 4095) // 4096
    j = tl.arange(0, KP)[None, :]
    return rows, there, start, first + j, j < m[:, None]


@triton.jit
def _own_rows(own_flat, own_bases, insides, segments, rows, there, start, WHOLE: tl.constexpr):
    """(R, 1) pointers to the first own weights of rows."""
    if WHOLE:
        where = own_flat + start
    else:
        segment = tl.load(segments + rows, mask=there, other=0)
        base = tl.load(own_bases + segment).to(own_flat.dtype)
        where = (base + tl.load(insides + rows, mask=there, other=0))[:, None]
    return where


@triton.jit
def _places(indices, kept, listed, ALL: tl.constexpr, KP: tl.constexpr):
    """Places inside the rows, never outside 0 .. 4095."""
    if ALL:
        places = tl.arange(0, KP)[None, :] + (kept * 0).to(tl.int32)
    else:
        places = tl.load(indices + kept, mask=listed, other=0).to(tl.int32) & 4095
    return places


@triton.jit(do_not_specialize=["num_rows", "k"])
def _scatter_add(
    vector, starts, numels, kept_starts, indices, values, factor, num_rows, k,
    ALL: tl.constexpr, R: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    _, _, start, kept, listed = _tile(starts, numels, kept_starts, num_rows, k, ALL, R, KP)
    where = vector + start + _places(indices, kept, listed, ALL, KP)
    product = tl.load(values + kept, mask=listed, other=0.0) * factor
    tl.store(where, tl.load(where, mask=listed, other=0.0) + product, mask=listed)


@triton.jit(do_not_specialize=["num_rows", "k"])
def _move_block(
    own_flat, own_bases, shared, touched, starts, insides, segments, numels, kept_starts,
    indices, values, factor, num_rows, k,
    WHOLE: tl.constexpr, SENT: tl.constexpr, ADDS: tl.constexpr, ALL: tl.constexpr,
    R: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    rows, there, start, kept, listed = _tile(starts, numels, kept_starts, num_rows, k, ALL, R, KP)
    place = _places(indices, kept, listed, ALL, KP)
    own = _own_rows(own_flat, own_bases, insides, segments, rows, there, start, WHOLE) + place
    known = tl.load(touched + start + place, mask=listed, other=0) != 0
    value = tl.load(values + kept, mask=listed, other=0.0)
    common = tl.load(shared + start + place, mask=listed, other=0.0)
    beyond = tl.load(own, mask=listed, other=0.0) - tl.where(known, 0.0, common)
    if SENT:
        beyond = beyond - value
    tl.store(own, beyond, mask=listed)
    tl.store(touched + start + place, (place * 0 + 1).to(tl.int8), mask=listed)
    if ADDS:
        tl.store(shared + start + place, common + value * factor, mask=listed)


@triton.jit
def _close_rows(
    own_flat, own_bases, shared, touched, starts, insides, segments, numels,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    there = rows >= 0
    start = tl.load(starts + rows)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = col < tl.load(numels + rows)[:, None]
    known = tl.load(touched + start + col, mask=inside, other=0) != 0
    own = _own_rows(own_flat, own_bases, insides, segments, rows, there, start, WHOLE) + col
    total = tl.load(own, mask=known, other=0.0) + tl.load(
        shared + start + col, mask=known, other=0.0
    )
    tl.store(own, total, mask=known)


@triton.jit
def _list_of(table, b, ALL: tl.constexpr):
    """Where block b lies; its line of the table: indices, values, dense values."""
    indices = tl.load(table + 3 * b).to(tl.pointer_type(tl.int16))
    if ALL:
        values = tl.load(table + 3 * b + 2).to(tl.pointer_type(tl.float32))
    else:
        values = tl.load(table + 3 * b + 1).to(tl.pointer_type(tl.float32))
    return indices, values


@triton.jit
def _find(indices, first, m, places, listed, KP: tl.constexpr, STEPS: tl.constexpr):
    """Where ascending lists of m have places, by bisection, and whether they do: (R, KP) each."""
    below = places * 0  # so many of a list are less
    for nth in tl.static_range(STEPS):
        step = KP >> nth
        inside = listed & (below + step <= m)
        at = tl.load(indices + first + (below + step - 1), mask=inside, other=0).to(tl.int32) & 4095
        below += tl.where(inside & (at < places), step, 0)
    found = listed & (below < m)
    at = tl.load(indices + first + below, mask=found, other=0).to(tl.int32) & 4095
    return below, found & (at == places)


@triton.jit(do_not_specialize=["num_rows", "k", "rank"])
def _move_at_once(
    own_flat, own_bases, shared_flat, starts, insides, segments, numels, kept_starts,
    table, factor, num_rows, k, rank,
    N: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr, ALL: tl.constexpr,
    R: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    rows, there, start, kept, listed = _tile(starts, numels, kept_starts, num_rows, k, ALL, R, KP)
    j = tl.arange(0, KP)[None, :] + (kept * 0).to(tl.int32)
    first = kept - j
    m = tl.sum(listed.to(tl.int32), axis=1)[:, None]
    mine = tl.program_id(1)
    indices, values = _list_of(table, mine, ALL)
    places = _places(indices, kept, listed, ALL, KP)
    own = _own_rows(own_flat, own_bases, insides, segments, rows, there, start, WHOLE) + places
    shared = shared_flat + start + places
    common = tl.load(shared, mask=listed, other=0.0)
    beyond = tl.load(own, mask=listed, other=0.0) - common
    writes = listed
    for other in range(N):
        at, found = j, listed
        indices, values = _list_of(table, other, ALL)
        if not ALL:
            if other != mine:
                at, found = _find(indices, first, m, places, listed, KP, STEPS)
        value = tl.load(values + first + at, mask=found, other=0.0)
        beyond = tl.where(found & (other == rank), beyond - value, beyond)
        common = tl.where(found, common + value * factor, common)
        writes = writes & ((found == 0) | (other >= mine))
    tl.store(own, common + beyond, mask=writes)
    tl.store(shared, common, mask=writes)


def scatter_add(
    vector: torch.Tensor,
    rows: Rows,
    kept_starts: torch.Tensor,
    k: int | None,
    indices: torch.Tensor,
    values: torch.Tensor,
    factor: float,
) -> None:
    """Add factor * values to a vector of the bucket, float32, where a block lists them.

    Args:
        vector: (numel,), changed in place.
        rows: where rows lie.
        kept_starts: (rows,) int64, the first value of every row.
        k: kept elements per full row; None: all elements of the rows, `indices` is not read.
        indices: (num_kept,) int16.
        values: (num_kept,) or (dense_numel,) float32.
        factor: rounded to float32, as is its product with a value.
    """
    if rows.count:
        tile, grid = _tiles(rows, k)
        _scatter_add[grid](
            vector, rows.starts, rows.numels, kept_starts, indices, values, float(factor),
            rows.count, k or MAX_ROW_NUMEL, **tile, enable_fp_fusion=False,
        )  # fmt: skip


def move_block(
    own: Memory,
    shared: torch.Tensor,
    touched: torch.Tensor,
    rows: Rows,
    kept_starts: torch.Tensor,
    k: int | None,
    indices: torch.Tensor,
    values: torch.Tensor,
    factor: float | None,
    *,
    sent: bool,
) -> None:
    """What one block does in a move: own -= shared at the first touch, and the block's sums.

    Args:
        own: the own weights, float32; changed.
        shared: (numel,) float32; changed.
        touched: (numel,) int8, not 0 where an earlier block listed an element; changed.
        rows: as for `scatter_add`.
        kept_starts: as there.
        k: as there.
        indices: as there.
        values: as there.
        factor: shared += factor * value; None: the shared weights stay.
        sent: own -= value.
    """
    if rows.count:
        tile, grid = _tiles(rows, k)
        _move_block[grid](
            *own.pointers, shared, touched, *rows.tables(), kept_starts, indices, values,
            float(factor or 0.0), rows.count, k or MAX_ROW_NUMEL, WHOLE=own.bases is None,
            SENT=sent, ADDS=factor is not None, **tile, enable_fp_fusion=False,
        )  # fmt: skip


def close_rows(own: Memory, shared: torch.Tensor, touched: torch.Tensor, rows: Rows) -> None:
    """Own += shared wherever `touched` is not 0; see `move_block`."""
    if rows.count:
        _close_rows[(rows.count,)](
            *own.pointers, shared, touched, *rows.tables(), WHOLE=own.bases is None,
            BLOCK=MAX_ROW_NUMEL, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def move_at_once(
    own: Memory,
    shared: torch.Tensor,
    rows: Rows,
    kept_starts: torch.Tensor,
    k: int | None,
    table: torch.Tensor,
    rank: int,
    factor: float,
) -> None:
    """A whole move with all blocks in memory: the same bits, and nothing else is written.

    Args:
        own: as for `move_block`.
        shared: as there.
        rows: as for `scatter_add`.
        kept_starts: as there.
        k: as there.
        table: (blocks, 3) int64, MAX_AT_ONCE blocks at most: addresses of each one's indices,
            values and dense values. The caller keeps them alive.
        rank: number of the own block.
        factor: shared += factor * value.
    """
    if rows.count:
        tile, (programs,) = _tiles(rows, k)
        _move_at_once[programs, 1 if k is None else len(table)](
            *own.pointers, shared, *rows.tables(), kept_starts, table, float(factor),
            rows.count, k or MAX_ROW_NUMEL, rank, N=len(table), WHOLE=own.bases is None,
            STEPS=int(tile["KP"]).bit_length(), **tile, enable_fp_fusion=False,
        )  # fmt: skip


def _tiles(rows: Rows, k: int | None) -> tuple[dict[str, int | bool], tuple[int]]:
    """How many rows, listed elements and warps a program has; how many programs there are."""
    width: int = triton.next_power_of_2(k or MAX_ROW_NUMEL)
    height = max(1, _TILE // width)
    warps = max(4, width // 256)
    tile: dict[str, int | bool] = {"ALL": k is None, "R": height, "KP": width, "num_warps": warps}
    return tile, (-(-rows.count // height),)
