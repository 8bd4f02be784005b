"""Index codes against a slow reference that follows the format's description bit by bit."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune.bucket.layout import BucketLayout, lay_out
from ds_gradprune.codec.bits import pack, packed_bytes, unpack
from ds_gradprune.codec.place_code import code_of
from ds_gradprune.codec.places import (
    check_places,
    places_bytes,
    read_places,
    write_places,
)
from ds_gradprune.errors import WireFormatError

pytestmark = pytest.mark.usefixtures("implementation")

SHAPES = [
    (1, 1), (2, 1), (3, 2), (9, 4), (120, 1), (120, 6), (300, 1), (300, 147), (300, 299),
    *((4096, k) for k in (1, 2, 3, 4, 5, 41, 205, 410, 1024, 1025, 4095, 4096)),
]  # fmt: skip


def rows_of(row_numel: int, row_kept: int, num_rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.choice(row_numel, row_kept, replace=False)) for _ in range(num_rows)]
    return np.array(rows, dtype=np.int16).reshape(num_rows, row_kept)


def layout_of(row_numel: int, row_kept: int, num_rows: int) -> tuple[BucketLayout, int]:
    """A layout of such rows, and the k that keeps so many of each.

    Full rows are one segment, so that they are a run; shorter ones are a segment each.
    """
    k = row_kept * 4096 // row_numel
    sizes = [row_numel * num_rows] if row_numel == 4096 else [row_numel] * num_rows
    layout = lay_out(sizes, [True] * len(sizes))
    assert all(run.row_kept == row_kept for run in layout.runs(k))
    return layout, k


def written(row_numel: int, table: np.ndarray) -> np.ndarray:
    layout, k = layout_of(row_numel, table.shape[1], len(table))
    out = np.full(places_bytes(layout, k), 0xAA, dtype=np.uint8)
    write_places(layout, k, table.reshape(-1), out)
    return out


def read(row_numel: int, row_kept: int, data: np.ndarray, num_rows: int) -> np.ndarray:
    """What is read, which is also what is checked: both or neither raise."""
    layout, k = layout_of(row_numel, row_kept, num_rows)
    table = np.full((num_rows, row_kept), -1, dtype=np.int16)
    try:
        check_places(layout, k, data)
    except WireFormatError as error:
        with pytest.raises(WireFormatError, match=re.escape(str(error))):
            read_places(layout, k, data, table.reshape(-1))
        raise
    read_places(layout, k, data, table.reshape(-1))
    return table


def to_bytes(bits: list[int]) -> bytes:
    """The first bit is the lowest of the first byte."""
    padded = bits + [0] * (-len(bits) % 8)
    groups = (padded[i : i + 8] for i in range(0, len(padded), 8))
    return bytes(sum(bit << place for place, bit in enumerate(group)) for group in groups)


def numbers_as_bytes(numbers: list[int], width: int) -> bytes:
    if width > 8:
        groups = [numbers[i : i + 8] for i in range(0, len(numbers), 8)]
        return b"".join(
            bytes(n & 255 for n in group) + numbers_as_bytes([n >> 8 for n in group], width - 8)
            for group in groups
        )
    return to_bytes([n >> place & 1 for n in numbers for place in range(width)])


def reference(table: list[list[int]], row_numel: int) -> bytes:
    """The cheapest of the four codes of the format's description."""
    kept = len(table[0])
    if kept == row_numel:
        return b""
    width = (row_numel - 1).bit_length()
    sizes = {width: kept * width, 0: row_numel}  # plain, bitmap; the first of the cheapest wins
    for low in range(width - 1, 0, -1):
        sizes[low] = kept * low + kept + (row_numel - 1 >> low)
    low = min(sizes, key=lambda bits: sizes[bits])
    if low == width:
        return numbers_as_bytes([i for row in table for i in row], width)
    if low == 0:
        return to_bytes([int(i in row) for row in map(set, table) for i in range(row_numel)])
    upper = []
    for row in table:
        before = 0
        for i in row:
            upper += [0] * ((i >> low) - before) + [1]
            before = i >> low
        upper += [0] * ((row_numel - 1 >> low) - before)
    return numbers_as_bytes([i & (1 << low) - 1 for row in table for i in row], low) + to_bytes(
        upper
    )


@pytest.mark.parametrize(("row_numel", "row_kept"), SHAPES)
@pytest.mark.parametrize("num_rows", [1, 2, 13])
def test_bytes_are_those_of_the_description(row_numel: int, row_kept: int, num_rows: int) -> None:
    table = rows_of(row_numel, row_kept, num_rows)
    data = written(row_numel, table)
    assert data.tobytes() == reference(table.tolist(), row_numel)
    np.testing.assert_array_equal(read(row_numel, row_kept, data, num_rows), table)


@pytest.mark.parametrize(("row_numel", "row_kept"), [(4096, 2), (4096, 41), (4096, 1500), (37, 5)])
def test_blocks_of_rows_leave_no_seam(row_numel: int, row_kept: int) -> None:
    """More rows than are worked on at a time: the parts still follow each other without a gap."""
    code = code_of(row_numel, row_kept)
    num_rows = 2 * code.block_rows + 3
    unit = rows_of(row_numel, row_kept, 5)
    table = np.tile(unit, (num_rows // 5 + 1, 1))[:num_rows]
    data = written(row_numel, table)
    np.testing.assert_array_equal(read(row_numel, row_kept, data, num_rows), table)
    lower = numbers_as_bytes([i & (1 << code.low_bits) - 1 for i in table.reshape(-1).tolist()],
                             code.low_bits)  # fmt: skip
    assert data[: len(lower)].tobytes() == lower


@given(st.integers(1, 300), st.data())
def test_any_row_survives(row_numel: int, data: st.DataObject) -> None:
    row_kept = data.draw(st.integers(1, row_numel))
    seed, num_rows = data.draw(st.integers(0, 2**16)), data.draw(st.integers(1, 9))
    table = rows_of(row_numel, row_kept, num_rows, seed)
    out = written(row_numel, table)
    assert out.tobytes() == reference(table.tolist(), row_numel)
    np.testing.assert_array_equal(read(row_numel, row_kept, out, num_rows), table)


@pytest.mark.parametrize(
    ("k", "low_bits", "row_bits", "over_entropy"),
    [
        (1, 12, 0, 0.0001),
        (3, 12, 0, 0.08),
        (4, 10, 7, 0.09),
        (41, 6, 104, 0.07),
        (205, 4, 460, 0.10),
        (410, 3, 921, 0.13),
        (1024, 2, 2047, 0.24),
        (1025, 0, 4096, 0.24),
        (2048, 0, 4096, 0.01),
        (4096, 0, 0, 0.0),
    ],
)
def test_choice_for_full_chunks(k: int, low_bits: int, row_bits: int, over_entropy: float) -> None:
    code = code_of(4096, k)
    assert (code.low_bits, code.row_bits) == (low_bits, row_bits)
    entropy_bits = (math.lgamma(4097) - math.lgamma(k + 1) - math.lgamma(4097 - k)) / math.log(2)
    assert code.bits_per_row <= entropy_bits * (1 + over_entropy) + 1e-6
    assert code.bits_per_row <= 12 * k


def test_never_more_than_12_bits_or_a_bitmap_would_take() -> None:
    for k in range(1, 4097):
        assert code_of(4096, k).bits_per_row <= min(12 * k, 4096)


def test_rows_of_one_shape_are_together_wherever_they_lie() -> None:
    """full, tail of 9, full, tail of 9: two groups, each without a gap inside."""
    layout = lay_out([4105, 4105], [True, True])
    full, tails = rows_of(4096, 41, 2), rows_of(9, 1, 2)
    indices = np.concatenate([full[0], tails[0], full[1], tails[1]])
    out = np.empty(places_bytes(layout, 41), dtype=np.uint8)
    write_places(layout, 41, indices, out)
    assert out.tobytes() == reference(full.tolist(), 4096) + reference(tails.tolist(), 9)
    again = np.empty_like(indices)
    read_places(layout, 41, out, again)
    np.testing.assert_array_equal(again, indices)


# --- damage that a checksum cannot tell, as from a faulty sender ----------------------------------


@pytest.mark.parametrize("row", [[5, 5], [6, 5], [4095, 0]])
def test_plain_indices_that_do_not_rise_are_refused(row: list[int]) -> None:
    data = np.frombuffer(numbers_as_bytes(row, 12), dtype=np.uint8)
    with pytest.raises(WireFormatError, match="payload's indices must rise inside every row"):
        read(4096, 2, data, 1)


def test_plain_index_beyond_a_short_row_is_refused() -> None:
    data = np.array([120], dtype=np.uint8)
    with pytest.raises(
        WireFormatError, match=r"payload's indices must be in 0 \.\. 119, .* got 120"
    ):
        read(120, 1, data, 1)


def test_lower_parts_that_fall_under_one_upper_part_are_refused() -> None:
    table = np.arange(41, dtype=np.int16)[None]
    data = written(4096, table)
    np.testing.assert_array_equal(read(4096, 41, data, 1), table)
    data[0] = 1  # 0, 1, 2 ... becomes 1, 0, 2 ...
    with pytest.raises(WireFormatError, match="payload's indices must rise inside every row"):
        read(4096, 41, data, 1)


def test_elias_fano_index_beyond_a_short_row_is_refused() -> None:
    table = np.array([[0, 1, 2, 3, 4, 119]], dtype=np.int16)  # 4 low bits: 119 is 7 * 16 + 7
    data = written(120, table)
    assert data[2] == 0x74  # the lower parts of the last two: 4 and 7
    data[2] = 0x84
    with pytest.raises(WireFormatError, match=r"must be in 0 \.\. 119, inside their row, got 120"):
        read(120, 6, data, 1)


@pytest.mark.parametrize("row_kept", [41, 1500])
def test_wrong_count_of_set_bits_is_refused(row_kept: int) -> None:
    code = code_of(4096, row_kept)
    data = written(4096, rows_of(4096, row_kept, 3))
    place = code.low_bytes(3) + 1
    for bit in range(8):
        changed = data.copy()
        changed[place] ^= 1 << bit
        with pytest.raises(WireFormatError, match=r"payload must set .* bits in the upper parts"):
            read(4096, row_kept, changed, 3)


@pytest.mark.parametrize(("row_numel", "row_kept"), [(4096, 41), (4096, 1500), (9, 3)])
def test_set_bit_in_the_row_beside_is_refused(row_numel: int, row_kept: int) -> None:
    code = code_of(row_numel, row_kept)
    assert code.row_bits
    data = written(row_numel, rows_of(row_numel, row_kept, 2))
    bits = np.unpackbits(data[code.low_bytes(2) :], bitorder="little")
    for source, target in ((0, 1), (1, 0)):
        changed, moved = data.copy(), bits.copy()
        rows = moved[: 2 * code.row_bits].reshape(2, -1)
        rows[source, np.flatnonzero(rows[source])[0]] = 0
        rows[target, np.flatnonzero(rows[target] == 0)[-1]] = 1
        changed[code.low_bytes(2) :] = np.packbits(moved, bitorder="little")
        with pytest.raises(WireFormatError, match=f"payload must set {row_kept} bits in every row"):
            read(row_numel, row_kept, changed, 2)


def test_unused_bits_must_be_zero() -> None:
    plain = written(120, np.array([[5]], dtype=np.int16))
    plain[0] |= 0x80
    with pytest.raises(WireFormatError, match="payload's unused bits must be zeros"):
        read(120, 1, plain, 1)
    upper = written(300, rows_of(300, 147, 1))  # a bitmap of 37.5 bytes
    upper[-1] |= 0x80
    with pytest.raises(WireFormatError, match="payload must set 147 bits in the upper parts"):
        read(300, 147, upper, 1)


@given(st.sampled_from(SHAPES), st.integers(1, 9), st.data())
def test_any_bytes_give_rising_indices_or_one_error(
    shape: tuple[int, int], num_rows: int, data: st.DataObject
) -> None:
    out = written(shape[0], rows_of(*shape, num_rows))
    for _ in range(data.draw(st.integers(0, 3)) if len(out) else 0):
        out[data.draw(st.integers(0, len(out) - 1))] = data.draw(st.integers(0, 255))
    try:
        table = read(*shape, out, num_rows)
    except WireFormatError as error:
        assert str(error).startswith("payload")  # noqa: PT017 - either way is right
        return
    assert (np.diff(table, axis=1) > 0).all()
    assert table.min() >= 0
    assert table.max() < shape[0]
    np.testing.assert_array_equal(written(shape[0], table), out)  # one way to write what was read


# --- packed numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", range(13))
@pytest.mark.parametrize("count", [*range(18), 1000])
def test_packed_numbers(width: int, count: int) -> None:
    numbers = np.random.default_rng(count).integers(0, 1 << width, count).astype(np.int16)
    out = np.full(packed_bytes(count, width), 0xAA, dtype=np.uint8)
    pack(numbers, width, out)
    assert out.tobytes() == numbers_as_bytes(numbers.tolist(), width)
    np.testing.assert_array_equal(unpack(out, count, width), numbers)
    assert packed_bytes(count, width) == (
        math.ceil(count * width / 8) if width <= 8 else count + math.ceil(count * (width - 8) / 8)
    )


def test_bits_above_the_width_are_dropped() -> None:
    out = np.empty(1, dtype=np.uint8)
    pack(np.array([0xFF, 0x101], dtype=np.int16), 4, out)
    assert out.tolist() == [0x1F]
