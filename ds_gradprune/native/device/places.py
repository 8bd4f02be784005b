"""Places of kept elements on an accelerator; `codec/places.py` describes the codes.

Rows of one shape are one stream of lower parts and one stream of upper parts. Upper parts are set
bit by bit in words of 32 bits; the order in which that happens changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_TILE = 1024


class Code(NamedTuple):
    """How the indices of rows of one shape are written: the fields of `PlaceCode`."""

    row_numel: int
    row_kept: int
    low_bits: int
    row_bits: int
    run_length: bool


@triton.jit(do_not_specialize=["num_rows", "m", "out_bytes"])
def _write_low(
    indices, kept_starts, num_rows, m, out, out_bytes, LOW: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Groups of eight numbers of 8 rows, the byte strings of `bits.pack`."""
    block = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * G + tl.arange(0, G)
    i = tl.arange(0, 8)[None, :]
    number = group[:, None] * 8 + i
    row = block * 8 + number // m
    there = (number < 8 * m) & (row < num_rows)
    kept = tl.load(kept_starts + row, mask=there, other=0) + number % m
    index = tl.load(indices + kept, mask=there, other=0).to(tl.int32) & 4095
    index = (index & ((1 << LOW) - 1)).to(tl.uint64)
    shift = i.to(tl.uint64)
    if LOW <= 8:
        first = tl.sum(index << (shift * LOW), axis=1)
        second = first
    else:
        first = tl.sum((index & 255) << (shift * 8), axis=1)
        second = tl.sum((index >> 8) << (shift * (LOW - 8)), axis=1)
    # The last group of all may have fewer numbers: then fewer whole bytes stand first.
    whole = tl.sum(there.to(tl.int32), axis=1)
    start = (block * m + group) * LOW
    for byte in tl.static_range(LOW):
        if LOW <= 8:
            part = first >> (8 * byte)
        else:
            lies_first = byte < whole
            nth = tl.where(lies_first, byte, byte - whole).to(tl.uint64)
            part = tl.where(lies_first, first, second) >> (nth * 8)
        mask = (group < m) & (start + byte < out_bytes)
        tl.store(out + start + byte, (part & 255).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "m", "row_bits", "before"])
def _write_high(
    indices, kept_starts, num_rows, m, row_bits, words, before,
    LOW: tl.constexpr, RUN: tl.constexpr, R: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    j = tl.arange(0, KP)[None, :]
    there = (row < num_rows)[:, None] & (j < m)
    first = tl.load(kept_starts + row, mask=row < num_rows, other=0)[:, None]
    index = tl.load(indices + first + j, mask=there, other=0).to(tl.int32) & 4095
    bit = before + (row * row_bits)[:, None] + (index >> LOW)
    if RUN:
        bit += j
    one = (bit * 0 + 1).to(tl.int32) << (bit & 31).to(tl.int32)
    tl.atomic_or(words + (bit >> 5), one, mask=there, sem="relaxed")


@triton.jit
def _low_part(low, number, count, there, LOW: tl.constexpr):
    """The lowest bits of some of `count` numbers, as `bits.unpack` finds them."""
    if LOW == 0:
        found = (number * 0).to(tl.int32)
    elif LOW <= 8:
        found = _bits_at(low, number * LOW, there, LOW)
    else:
        group = number >> 3
        i = number & 7
        whole = tl.minimum(count - group * 8, 8)
        found = tl.load(low + group * LOW + i, mask=there, other=0).to(tl.int32)
        upper = (group * LOW + whole) * 8 + i * (LOW - 8)
        found = found | (_bits_at(low, upper, there, LOW - 8) << 8)
    return found


@triton.jit
def _bits_at(data, bit, there, WIDTH: tl.constexpr):
    """WIDTH <= 8 bits from a bit on."""
    inner = (bit & 7).to(tl.int32)
    word = tl.load(data + (bit >> 3), mask=there, other=0).to(tl.int32)
    beyond = there & (inner + WIDTH > 8)
    word = word | (tl.load(data + (bit >> 3) + 1, mask=beyond, other=0).to(tl.int32) << 8)
    return (word >> inner) & ((1 << WIDTH) - 1)


@triton.jit(do_not_specialize=["num_rows", "n", "m", "row_bits"])
def _read_places(
    low, high, kept_starts, num_rows, n, m, row_bits, indices,
    LOW: tl.constexpr, RUN: tl.constexpr, UPPER: tl.constexpr, ALL: tl.constexpr,
    R: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    is_row = (row < num_rows)[:, None]
    col = tl.arange(0, KP)[None, :]
    first = tl.load(kept_starts + row, mask=row < num_rows, other=0)[:, None]
    if UPPER:
        bit = (row * row_bits)[:, None] + col
        inside = is_row & (col < row_bits)
        byte = tl.load(high + (bit >> 3), mask=inside, other=0).to(tl.int32)
        flag = (byte >> (bit & 7).to(tl.int32)) & 1
        j = tl.cumsum(flag, axis=1) - flag
        listed = (flag != 0) & (j < m)  # m bits, if these bytes have been checked
        upper = col + j * 0
        if RUN:
            upper = col - j
    else:
        j = col + tl.zeros((R, KP), tl.int32)
        listed = is_row & (j < m)
        upper = j * 0
    if ALL:
        place = j
    else:
        count = num_rows.to(tl.int64) * m
        number = (row * m)[:, None] + j
        place = (upper << LOW) | _low_part(low, number, count, listed, LOW)
    place = tl.minimum(place, n - 1)
    tl.store(indices + first + j, place.to(tl.int16), mask=listed)


def write(
    code: Code,
    kept_starts: torch.Tensor,
    indices: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
) -> None:
    """Write the indices of all rows of one shape.

    Args:
        code: how.
        kept_starts: (rows,) int64, the first kept element of every row.
        indices: (num_kept,) int16.
        low: uint8, all bytes of the lower parts; written.
        high: uint8, all bytes of the upper parts, zero; in memory of whole words of 4 bytes, of
            which the other bytes stay as they are.
    """
    num_rows, m = kept_starts.numel(), code.row_kept
    if code.low_bits:
        _write_low[(-(-num_rows // 8), -(-m // 128))](
            indices, kept_starts, num_rows, m, low, low.numel(), LOW=code.low_bits, G=128,
            num_warps=4,
        )  # fmt: skip
    if code.row_bits:
        begin, skipped = high.storage_offset(), high.storage_offset() % 4
        covered = -(-(skipped + high.numel()) // 4) * 4
        words = high.as_strided((covered,), (1,), begin - skipped).view(torch.int32)
        width: int = triton.next_power_of_2(m)
        rows = max(1, _TILE // width)
        _write_high[(-(-num_rows // rows),)](
            indices, kept_starts, num_rows, m, code.row_bits, words, 8 * skipped,
            LOW=code.low_bits, RUN=code.run_length, R=rows, KP=width,
            num_warps=max(4, width // 256),
        )  # fmt: skip


def read(
    code: Code,
    kept_starts: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Fill the indices of all rows of one shape from bytes that the host has checked.

    Bytes that nobody has checked give wrong indices, but none outside its row.
    """
    num_rows, m = kept_starts.numel(), code.row_kept
    width: int = triton.next_power_of_2(code.row_bits or m)
    rows = max(1, _TILE // width)
    _read_places[(-(-num_rows // rows),)](
        low, high, kept_starts, num_rows, code.row_numel, m, code.row_bits, indices,
        LOW=code.low_bits, RUN=code.run_length, UPPER=code.row_bits > 0,
        ALL=m == code.row_numel, R=rows, KP=width, num_warps=max(4, width // 256),
    )  # fmt: skip
