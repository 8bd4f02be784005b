"""The k largest magnitudes of every row, exactly, ties by lowest index, on an accelerator.

One program works on a few rows, one after the other, each of them in registers. The bits of |t|,
read as an integer, rise with |t| (IEEE 754; inf and nan are the largest). A row is counted through
a few times for how many magnitudes reach a threshold, which is moved until exactly k do. It starts
where it ended in the row before. If equal magnitudes leave no such threshold, the k-th one is it,
and the first of its equals are kept. A guess costs time at most, never exactness.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ds_gradprune.native.device.rows import MAX_ROW_NUMEL, Rows, Source, row_of

ROWS_PER_PROGRAM = 8
"""The first row of a program is searched for from afar; more rows leave less to share out."""

_GROUPS = 128
"""Of a row; 32 elements each, one word of bits."""

_MANY_KEPT = 128
"""From here on twice the warps are faster: measured at 41 and 205."""

_SHIFTS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""Low bits of a float32 that are zero in every number of a dtype."""


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
    if MASKED:
        loaded = tl.load(pointers, mask=inside, other=0.0)
    else:
        loaded = tl.load(pointers)
    return loaded.to(tl.float32)


@triton.jit
def _sum_of(
    x, y, z, cols, inside, a, b, HAS_Y: tl.constexpr, HAS_Z: tl.constexpr, MASKED: tl.constexpr
):
    """T of one row: (x + a * y) + b * z, every product and sum rounded; outside 0."""
    t = _load(x + cols, inside, MASKED)
    if HAS_Y:
        t = t + _load(y + cols, inside, MASKED) * a
    if HAS_Z:
        t = t + _load(z + cols, inside, MASKED) * b
    return t


@triton.jit
def _octaves(count):
    """2**23 times about the binary logarithm of a count."""
    number = tl.maximum(count, 1).to(tl.float32)
    return number.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def _guess_of(t, n, SHIFT: tl.constexpr):
    """Where to look first: twice the mean magnitude; it may be anything."""
    mean = tl.sum(tl.abs(t)) / n.to(tl.float32)
    return ((mean * 2.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> SHIFT


@triton.jit
def _threshold(keys, n, k, guess, slope, SHIFT: tl.constexpr):
    """A magnitude that at least k of n reach, how many more than k do, and the new slope.

    The bracket: at least k magnitudes reach `low`, less than k reach `top` + 1. While it has no two
    ends, a step goes by how counts fall with magnitudes, as powers do, and somewhat beyond k. Then
    it is cut where a straight line has k, and now and then in the middle.
    """
    TOP: tl.constexpr = 0x7FFFFFFF >> SHIFT
    low = n * 0
    top = low + TOP
    count_low = n
    count_top = low
    excess = n - k
    tries = low
    guess = tl.minimum(tl.maximum(guess, 1), TOP)
    margin = 2.0 * tl.sqrt(k.to(tl.float32))
    while (excess != 0) & (low < top):
        count = tl.sum((keys >= (guess.to(tl.uint32) << (SHIFT + 1))).to(tl.int32))
        if count >= k:
            low = guess
            count_low = count
            excess = count - k
        else:
            top = guess - 1
            count_top = count
        step = low - guess + (top - low + 1) // 2
        if (low > 0) & (top < TOP):
            width = (top - low + 1).to(tl.float32)
            if (tries < 5) | (tries & 1 == 0):
                part = (excess.to(tl.float32) - 0.5) / (count_low - count_top).to(tl.float32)
                step = low - guess + (width * part).to(tl.int32)
            slope = width / tl.maximum(_octaves(count_low) - _octaves(count_top), 1.0)
        elif tries < 5:
            miss = (count - k).to(tl.float32)
            beyond = k.to(tl.float32) - miss * 0.125 - tl.where(miss > 0, margin, -margin)
            aim = tl.maximum(beyond, 1.0).to(tl.int32)
            far = (_octaves(count) - _octaves(aim)) * slope
            step = tl.minimum(tl.maximum(far, -1e9), 1e9).to(tl.int32)
        if (count == 0) & (low == 0) & (tries < 2):
            step = 1 - guess  # settles rows of zeros
        guess = guess + tl.minimum(tl.maximum(step, low + 1 - guess), top - guess)
        tries += 1
    return low, excess, slope


@triton.jit
def _words(chosen, inside, GROUPS: tl.constexpr, MASKED: tl.constexpr):
    """One bit per element: (GROUPS,) uint32, the lowest bit for the first of a group."""
    SIZE: tl.constexpr = chosen.shape[0] // GROUPS
    if MASKED:
        chosen = chosen & inside
    bit = tl.full((1, SIZE), 1, tl.uint32) << tl.arange(0, SIZE)[None, :].to(tl.uint32)
    flags = tl.reshape(chosen, (GROUPS, SIZE))
    return tl.sum(tl.where(flags, bit, 0), axis=1).to(tl.uint32)


@triton.jit
def _ones(words):
    """How many bits are set, int32."""
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    sixteens = eights + (eights >> 8)
    return ((sixteens + (sixteens >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def _bit_number(bit):
    """Which bit is the only one set: the exponent of it as a float32."""
    return (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _drop_last(words, equals, excess):
    """Without the last `excess` of those that `equals` lists, all of which `words` lists."""
    counts = _ones(equals)
    before = tl.cumsum(counts) - counts
    left = tl.sum(counts) - excess - before  # so many of the group's stay
    most = tl.max(counts)
    nth = most * 0
    dropped = equals
    while nth < most:
        lowest = dropped & (0 - dropped)
        dropped = tl.where(nth < left, dropped ^ lowest, dropped)
        nth += 1
    return words ^ dropped


@triton.jit(do_not_specialize=["num_rows", "k"])
def _select_rows(
    x_flat, x_bases, y_flat, a, z_flat, b,
    starts, insides, segments, numels, kept_starts, indices, values, scratch, num_rows, k,
    HAS_Y: tl.constexpr, HAS_Z: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr,
    FULL: tl.constexpr, SHIFT: tl.constexpr, PER_PROGRAM: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    groups = tl.arange(0, GROUPS)
    first = tl.program_id(0) * PER_PROGRAM
    threshold = first * 0
    slope = threshold.to(tl.float32)
    for nth in range(PER_PROGRAM):
        row = first + nth
        if row < num_rows:
            n = tl.load(numels + row)
            inside = cols < n
            x, start = row_of(x_flat, x_bases, starts, insides, segments, row, WHOLE, ALIGN)
            y = y_flat + start
            z = z_flat + start
            t = _sum_of(x, y, z, cols, inside, a, b, HAS_Y, HAS_Z, not FULL)
            bits = t.to(tl.uint32, bitcast=True)
            keys = (bits << 1) | (bits >> 31)  # the magnitude above the sign
            if threshold == 0:
                threshold = _guess_of(t, n, SHIFT)
                slope = threshold.to(tl.float32) * 0.0 + (0.25 / (1 << SHIFT))
            m = (n * k + (BLOCK - 1)) // BLOCK
            threshold, excess, slope = _threshold(keys, n, m, threshold, slope, SHIFT)
            chosen = keys >= (threshold.to(tl.uint32) << (SHIFT + 1))
            words = _words(chosen, inside, GROUPS, not FULL)
            if excess > 0:
                equal = (keys >> (SHIFT + 1)) == threshold.to(tl.uint32)
                words = _drop_last(words, _words(equal, inside, GROUPS, not FULL), excess)
            # By way of memory every thread gets words of its own, once.
            mine = scratch + tl.program_id(0) * GROUPS + groups
            tl.debug_barrier()
            tl.store(mine, words.to(tl.int32, bitcast=True))
            tl.debug_barrier()
            words = tl.load(mine).to(tl.uint32, bitcast=True)
            counts = _ones(words)
            place = tl.load(kept_starts + row) + tl.cumsum(counts) - counts
            most = tl.max(counts)
            done = most * 0
            while done < most:
                lowest = words & (0 - words)
                col = groups * (BLOCK // GROUPS) + _bit_number(lowest)
                listed = words != 0
                number = _sum_of(x, y, z, col, listed, a, b, HAS_Y, HAS_Z, True)
                tl.store(indices + place, col.to(tl.int16), mask=listed)
                tl.store(values + place, number, mask=listed)
                words = words ^ lowest
                place += 1
                done += 1


@triton.jit
def _load_rows(
    x_flat, x_bases, y_flat, a, z_flat, b, starts, insides, segments, numels, out_starts, out,
    HAS_Y: tl.constexpr, HAS_Z: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr,
    FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    inside = cols < tl.load(numels + row)
    x, start = row_of(x_flat, x_bases, starts, insides, segments, row, WHOLE, ALIGN)
    t = _sum_of(x, y_flat + start, z_flat + start, cols, inside, a, b, HAS_Y, HAS_Z, True)
    tl.store(out + tl.load(out_starts + row) + cols, t, mask=inside)


def select(
    source: Source,
    rows: Rows,
    kept_starts: torch.Tensor,
    k: int,
    indices: torch.Tensor,
    values: torch.Tensor,
    *,
    num_warps: int | None = None,
    max_registers: int | None = None,
    rows_per_program: int = ROWS_PER_PROGRAM,
) -> None:
    """Keep the largest magnitudes of every row of t.

    Args:
        source: what t is.
        rows: where rows lie.
        kept_starts: (rows,) int64, the first kept element of every row.
        k: kept elements per full row, 1 .. 4096; a row of n keeps ceil(k * n / 4096).
        indices: (num_kept,) int16, written; ascending in each row.
        values: (num_kept,) float32, written: t there.
        num_warps: of a program on full rows; None: what was fastest at this k, registers too.
        max_registers: of a thread, so that several programs fit a processor; None: no limit.
        rows_per_program: worked on one after the other.
    """
    if not rows.count:
        return
    shift = 0 if source.y is not None or source.z is not None else _SHIFTS[source.dtype]
    if not rows.full:  # masks take registers, and these rows are few
        num_warps, max_registers = 8, None
    elif num_warps is None:
        num_warps, max_registers = (2, 128) if k < _MANY_KEPT else (4, 80)
    programs = -(-rows.count // rows_per_program)
    scratch = torch.empty(programs * _GROUPS, dtype=torch.int32, device=indices.device)
    _select_rows[(programs,)](
        *source.arguments(), *rows.tables(), kept_starts, indices, values, scratch, rows.count, k,
        **source.constants(rows), SHIFT=shift, PER_PROGRAM=rows_per_program, GROUPS=_GROUPS,
        BLOCK=MAX_ROW_NUMEL, num_warps=num_warps, maxnreg=max_registers, enable_fp_fusion=False,
    )  # fmt: skip


def load(source: Source, rows: Rows, out_starts: torch.Tensor, out: torch.Tensor) -> None:
    """Write all of t of every row into `out`, (n,) float32, from (rows,) `out_starts` on."""
    if rows.count:
        _load_rows[(rows.count,)](
            *source.arguments(), *rows.tables(), out_starts, out,
            **source.constants(rows), BLOCK=MAX_ROW_NUMEL, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
