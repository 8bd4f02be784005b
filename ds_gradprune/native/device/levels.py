"""Values of 4 and 2 bits on an accelerator; `codec/levels.py` describes them and is the reference.

Every sum stands in the order of the reference, and every division is rounded to nearest.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_BLOCKS = 16
"""Blocks of 128 values that a program writes or reads."""

_MAX = tl.constexpr(3.3895313892515355e38)
"""The largest finite bfloat16."""

_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _bfloat16_bits(x):
    """The nearest finite bfloat16 of numbers >= 0, its 16 bits as int32; nan stays nan."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = tl.minimum((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7F7F)
    return tl.where(bits > _INFINITY, 0x7FC0, rounded)


@triton.jit
def _widened(bits):
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _pairs(x, B: tl.constexpr):
    """Of (B, 8) partial sums the sum, pairs first, as numpy forms it."""
    left, right = tl.split(tl.reshape(x, (B, 4, 2)))
    left, right = tl.split(tl.reshape(left + right, (B, 2, 2)))
    left, right = tl.split(left + right)
    return left + right


@triton.jit
def _share(values, first, i, count, j):
    """(B, 8): every i-th group of eight magnitudes of blocks, finite, over 128."""
    where = tl.minimum(first + i * 8 + j, count - 1)
    bits = tl.load(values + where).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.minimum(bits.to(tl.float32, bitcast=True), _MAX) * (1.0 / 128)


@triton.jit
def _two_means(values, blocks, count, least, B: tl.constexpr):
    """Means of a block's magnitudes up to their mean and above it."""
    first = (blocks * 128)[:, None]
    j = tl.arange(0, 8)[None, :]
    total = _share(values, first, 0, count, j)
    for i in tl.static_range(1, 16):
        total = total + _share(values, first, i, count, j)
    mean = (_pairs(total, B) * (1.0 / 128))[:, None]
    below = tl.zeros((B, 8), tl.float32)
    above = tl.zeros((B, 8), tl.float32)
    number = tl.zeros((B, 8), tl.int32)
    for i in tl.static_range(16):
        share = _share(values, first, i, count, j)
        is_above = share > mean
        above = above + tl.where(is_above, share, 0.0)
        below = below + tl.where(is_above, 0.0, share)
        number += is_above.to(tl.int32)
    num_above = tl.sum(number, axis=1)
    full = tl.full((B,), 128.0, tl.float32)
    low = _pairs(below, B) * tl.div_rn(full, tl.maximum(128 - num_above, 1).to(tl.float32))
    high = _pairs(above, B) * tl.div_rn(full, tl.maximum(num_above, 1).to(tl.float32))
    high = tl.maximum(high, low)
    return tl.minimum(low, tl.minimum(least, _MAX / 2) * 1.9), high


@triton.jit(do_not_specialize=["count", "packed_bytes"])
def _write_levels(
    values, count, shares, widest, ends, packed, packed_bytes,
    BITS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    there = blocks * 128 < count
    where = (blocks * 128)[:, None] + tl.arange(0, 128)[None, :]
    # A last block that is not full is filled with its last value, which moves no end.
    bits = tl.load(values + tl.minimum(where, count - 1)).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    least = tl.min(magnitude, axis=1)
    largest = tl.max(magnitude, axis=1)
    low = least.to(tl.float32, bitcast=True)
    high = largest.to(tl.float32, bitcast=True)
    if BITS == 2:
        low, high = _two_means(values, blocks, count, low, B)
    is_nan = largest > _INFINITY  # some are nan, so all of the block is
    high = tl.where(is_nan, largest.to(tl.float32, bitcast=True), high)
    low = tl.where(is_nan, high, low)
    low_bits = _bfloat16_bits(low)
    high_bits = _bfloat16_bits(high)
    low = _widened(low_bits)
    high = _widened(high_bits)
    wide = tl.div_rn(high, tl.zeros((B,), tl.float32) + widest) > low
    low_bits = tl.where(wide, 0, low_bits)
    low = tl.where(wide, 0.0, low)
    number = tl.zeros((B, 128), tl.int32)
    number_of_levels: tl.constexpr = 1 << (BITS - 1)
    for level in tl.static_range(1, number_of_levels):
        lower = low + tl.load(shares + level - 1) * (high - low)
        upper = low + tl.load(shares + level) * (high - low)
        bound = lower * 0.5 + upper * 0.5
        number += (magnitude.to(tl.float32, bitcast=True) > bound[:, None]).to(tl.int32)
    sign = (bits >> 31) & 1
    code = tl.where(where < count, number | (sign << (BITS - 1)), 0)
    first, second = tl.split(tl.reshape(code, (B, 64, 2)))
    byte = first | (second << BITS)
    if BITS == 2:
        first, second = tl.split(tl.reshape(byte, (B, 32, 2)))
        byte = first | (second << 4)
    size: tl.constexpr = 16 * BITS
    at = (blocks * size)[:, None] + tl.arange(0, size)[None, :]
    tl.store(packed + at, byte.to(tl.uint8), mask=at < packed_bytes)
    tl.store(ends + 4 * blocks, (low_bits & 255).to(tl.uint8), mask=there)
    tl.store(ends + 4 * blocks + 1, (low_bits >> 8).to(tl.uint8), mask=there)
    tl.store(ends + 4 * blocks + 2, (high_bits & 255).to(tl.uint8), mask=there)
    tl.store(ends + 4 * blocks + 3, (high_bits >> 8).to(tl.uint8), mask=there)


@triton.jit
def _end(ends, at, inside):
    """The bfloat16 number in two bytes."""
    low = tl.load(ends + at, mask=inside, other=0).to(tl.int32)
    high = tl.load(ends + at + 1, mask=inside, other=0).to(tl.int32)
    return _widened(low | (high << 8))


@triton.jit(do_not_specialize=["count"])
def _read_levels(
    ends, packed, count, shares, out, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    low = _end(ends, (i >> 7) * 4, inside)
    high = _end(ends, (i >> 7) * 4 + 2, inside)
    bit = (i * BITS) & 7
    byte = tl.load(packed + ((i * BITS) >> 3), mask=inside, other=0).to(tl.int32)
    code = (byte >> bit.to(tl.int32)) & ((1 << BITS) - 1)
    share = tl.load(shares + (code & ((1 << (BITS - 1)) - 1)))
    value = share * (high - low) + low
    sign = (code >> (BITS - 1)) << 31
    value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    tl.store(out + i, value, mask=inside)


def write(
    bits: int, shares: Sequence[float], widest: float, values: torch.Tensor, out: torch.Tensor
) -> None:
    """Fill `out`, exactly the format's bytes, from (n,) float32 values on the same device.

    Args:
        bits: of a value, 4 or 2.
        shares: t of every magnitude.
        widest: high / low of a block, above which low becomes 0.
        values: contiguous.
        out: uint8, at any address.
    """
    count = values.numel()
    if count:
        blocks = -(-count // 128)
        packed = out[4 * blocks :]
        _write_levels[(-(-blocks // _BLOCKS),)](
            values, count, _table(tuple(shares), values.device), float(widest), out, packed,
            packed.numel(), BITS=bits, B=_BLOCKS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def read(bits: int, shares: Sequence[float], data: torch.Tensor, out: torch.Tensor) -> None:
    """Fill (n,) float32 `out` from what `write` made; any bytes give some numbers."""
    count = out.numel()
    if count:
        size = 128 * _BLOCKS
        _read_levels[(-(-count // size),)](
            data, data[-(-count // 128) * 4 :], count, _table(tuple(shares), out.device), out,
            BITS=bits, BLOCK=size, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@functools.cache
def _table(shares: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(shares, dtype=torch.float32, device=device)
