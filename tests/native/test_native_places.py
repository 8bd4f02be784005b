"""Place codes by the kernels: the bytes of the numpy reference, and every fault it finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune.bucket.layout import BucketLayout, lay_out
from ds_gradprune.codec.places import groups, places_bytes, reference_read, reference_write
from ds_gradprune.errors import WireFormatError
from ds_gradprune.native import library
from ds_gradprune.native.library import Bytes, Fault, Kernels, Longs, Shorts, places_table

KS = (1, 2, 3, 4, 15, 41, 205, 512, 1024, 1025, 2048, 4095, 4096)
LAYOUTS = {
    "one_row": lay_out([4096], [True]),
    "many_rows": lay_out([131 * 4096], [True]),
    "many_runs": lay_out([9 * 4096, 4096, 5, 4096 * 3 + 100, 100, 4096], [True] * 6),
    "short_rows": lay_out([1, 2, 3, 7, 64, 65, 1000, 1000, 1000], [True] * 9),
    "none": lay_out([5000], [False]),
}


def table(layout: BucketLayout, k: int) -> Longs:
    return places_table((group.code, group.runs) for group in groups(layout, k))


def some_indices(layout: BucketLayout, k: int, seed: int = 0) -> Shorts:
    rng = np.random.default_rng(seed)
    rows = [
        np.sort(rng.permutation(run.row_numel)[: run.row_kept])
        for run in layout.runs(k)
        for _ in range(run.num_rows)
    ]
    return np.concatenate([np.empty(0), *rows]).astype(np.int16)


def written(layout: BucketLayout, k: int, indices: Shorts) -> Bytes:
    out = np.full(places_bytes(layout, k), 0xAA, np.uint8)
    reference_write(layout, k, indices, out)
    return out


def message_of(layout: BucketLayout, k: int, data: Bytes) -> str:
    try:
        reference_read(layout, k, data, None)
    except WireFormatError as error:
        return str(error)
    return ""


FAULTS = {
    Fault.UNUSED_BITS: ("unused bits",),
    Fault.UPPER_BITS: ("bits in the upper parts", "bits in every row"),
    Fault.ORDER: ("must rise",),
    Fault.RANGE: ("inside their row",),
}


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bytes_and_indices_are_the_reference(native: Kernels, layout: BucketLayout, k: int) -> None:
    indices = some_indices(layout, k)
    want = written(layout, k, indices)
    for threads in (1, 3):
        out = np.full(len(want), 0x55, np.uint8)
        assert native.write_places(table(layout, k), indices, out, threads) is Fault.NONE
        assert np.array_equal(out, want)
        got = np.full(len(indices), -1, np.int16)
        assert native.read_places(table(layout, k), out, got, threads) is Fault.NONE
        assert np.array_equal(got, indices)
        assert native.check_places(table(layout, k), out, threads) is Fault.NONE


@pytest.mark.parametrize("extreme", ["first", "last"])
@pytest.mark.parametrize("k", KS)
def test_indices_at_the_ends_of_a_row(native: Kernels, k: int, extreme: str) -> None:
    layout = LAYOUTS["many_rows"]
    row = np.arange(k) if extreme == "first" else np.arange(4096 - k, 4096)
    indices = np.tile(row, 131).astype(np.int16)
    out = np.empty(places_bytes(layout, k), np.uint8)
    assert native.write_places(table(layout, k), indices, out) is Fault.NONE
    assert np.array_equal(out, written(layout, k, indices))
    got = np.empty_like(indices)
    assert native.read_places(table(layout, k), out, got) is Fault.NONE
    assert np.array_equal(got, indices)


@given(
    shape=st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    num_rows=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_rows_of_any_shape(shape: tuple[int, int], num_rows: int, seed: int) -> None:
    kernels = library.kernels()
    if kernels is None:
        pytest.skip("needs the native kernels, so a C++ compiler")
    numel, k = shape
    layout = lay_out([numel] * num_rows, [True] * num_rows)
    indices = some_indices(layout, k, seed)
    out = np.empty(places_bytes(layout, k), np.uint8)
    assert kernels.write_places(table(layout, k), indices, out) is Fault.NONE
    assert np.array_equal(out, written(layout, k, indices))
    got = np.empty_like(indices)
    assert kernels.read_places(table(layout, k), out, got) is Fault.NONE
    assert np.array_equal(got, indices)


@pytest.mark.parametrize("k", [1, 3, 41, 205, 1024, 2048])
@pytest.mark.parametrize("name", ["one_row", "many_runs", "short_rows"])
def test_damage_is_found_where_the_reference_finds_it(native: Kernels, name: str, k: int) -> None:
    layout = LAYOUTS[name]
    rng = np.random.default_rng(k)
    whole = written(layout, k, some_indices(layout, k))
    for trial in range(200):
        data = whole.copy()
        if trial % 3 == 0:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        elif trial % 3 == 1:
            one, two = rng.integers(len(data), size=2)
            data[one], data[two] = data[two], data[one]
        else:
            data[:] = rng.integers(0, 256, len(data))
        message = message_of(layout, k, data)
        got = np.empty(layout.num_kept(k), np.int16)
        fault = native.read_places(table(layout, k), data, got, 2)
        assert fault is native.check_places(table(layout, k), data)
        assert bool(fault) == bool(message)


def test_every_fault_has_the_name_the_reference_gives_it(native: Kernels) -> None:
    cases: list[tuple[int, Fault, Bytes]] = []
    # Two indices of 12 bits: their low bytes, then their upper 4 bits.
    cases += [(2, Fault.ORDER, np.array(data, np.uint8)) for data in ((5, 5, 0), (9, 5, 0))]
    elias = written(LAYOUTS["one_row"], 205, np.arange(205, dtype=np.int16))
    missing, unused = elias.copy(), elias.copy()
    missing[103] ^= 1  # 205 numbers of 4 bits before it
    unused[102] |= 0x80
    cases += [(205, Fault.UPPER_BITS, missing), (205, Fault.UNUSED_BITS, unused)]
    for k, fault, data in cases:
        assert native.check_places(table(LAYOUTS["one_row"], k), data) is fault
        message = message_of(LAYOUTS["one_row"], k, data)
        assert any(words in message for words in FAULTS[fault])


def test_an_index_beyond_a_short_row_is_found(native: Kernels) -> None:
    layout = lay_out([1000], [True])  # an index takes 10 bits, so 1000 .. 1023 can be written
    data = np.array([0xFF, 0x03], np.uint8)
    assert places_bytes(layout, 1) == 2
    assert native.check_places(table(layout, 1), data) is Fault.RANGE
    assert any(words in message_of(layout, 1, data) for words in FAULTS[Fault.RANGE])


@pytest.mark.parametrize(
    ("index", "fault"), [(-1, Fault.RANGE), (1000, Fault.ORDER), (4096, Fault.RANGE)]
)
def test_wrong_indices_are_not_written(native: Kernels, index: int, fault: Fault) -> None:
    layout = LAYOUTS["one_row"]
    indices = np.arange(205, dtype=np.int16)
    indices[0 if index < 0 else 204 if index > 1000 else 100] = index
    out = np.empty(places_bytes(layout, 205), np.uint8)
    assert native.write_places(table(layout, 205), indices, out) is fault
    with pytest.raises(ValueError, match="must"):
        reference_write(layout, 205, indices, out)
