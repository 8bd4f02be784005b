"""Values by the kernels: the bytes and the numbers of the numpy references."""

from __future__ import annotations

import numpy as np
import pytest

from ds_gradprune.codec.levels import Levels
from ds_gradprune.codec.values import Bfloat16, Float32, ValueFormat
from ds_gradprune.native.library import Bytes, Fault, Floats, Kernels
from tests.helpers.hard_numbers import Hard, same_bits

FORMATS = (Levels(2), Levels(4), Bfloat16(), Float32())
COUNTS = (0, 1, 2, 3, 127, 128, 129, 1000, 2**17 + 77)


def written(form: ValueFormat, values: Floats) -> Bytes:
    out = np.full(form.nbytes(len(values)), 0xAA, np.uint8)
    with np.errstate(all="ignore"):
        form.reference_write(values, out)
    return out


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("count", COUNTS)
def test_bytes_and_numbers_are_the_reference(
    native: Kernels, hard: Hard, form: ValueFormat, count: int
) -> None:
    values = hard(count, count)
    want = written(form, values)
    numbers = np.empty(count, np.float32)
    with np.errstate(all="ignore"):
        form.reference_read(want, numbers)
    for threads in (1, 3):
        out = np.full(len(want), 0x55, np.uint8)
        native.write_values(form.bits, values, out, threads)
        if not np.isnan(values).any():  # of which nan it is, nothing is promised
            assert np.array_equal(out, want)
        got = np.full(count, 7.0, np.float32)
        assert native.read_values(form.bits, want, got, threads) is Fault.NONE
        assert same_bits(got, numbers)
        assert native.read_values(form.bits, out, got, threads) is Fault.NONE
        assert same_bits(got, numbers)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS[:3], ids=lambda form: form.name)
def test_millions_of_blocks_of_any_scale(native: Kernels, form: ValueFormat) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        bands = 1 + rng.uniform(0, 4, (2000, 1)) * rng.random((2000, 128))
        scales = 10.0 ** rng.uniform(-44, 38, (2000, 1))
        signs = rng.choice([-1.0, 1.0], (2000, 128))
        with np.errstate(over="ignore", under="ignore"):
            values = (bands * scales * signs).astype(np.float32).reshape(-1)
        want = written(form, values)
        out = np.empty_like(want)
        native.write_values(form.bits, values, out)
        assert np.array_equal(out, want)
        numbers, got = np.empty_like(values), np.empty_like(values)
        form.reference_read(want, numbers)
        assert native.read_values(form.bits, want, got) is Fault.NONE
        assert np.array_equal(got.view(np.uint32), numbers.view(np.uint32))


def test_every_bfloat16_is_read_and_every_tie_rounded_to_even(native: Kernels) -> None:
    every = np.arange(2**16, dtype=np.uint32)
    data = every.astype("<u2").view(np.uint8)
    numbers = np.empty(2**16, np.float32)
    assert native.read_values(16, data, numbers) is Fault.NONE
    assert np.array_equal(numbers.view(np.uint32), every << 16)
    ties = ((every << 16) + 0x8000).view(np.float32)
    ties = ties[np.isfinite(ties)]
    out = np.empty(2 * len(ties), np.uint8)
    native.write_values(16, ties, out)
    assert np.array_equal(out, written(Bfloat16(), ties))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    ("ends", "fault"),
    [
        ((1.0, 2.0), Fault.NONE),
        ((0.0, 0.0), Fault.NONE),
        ((-0.0, 0.0), Fault.NONE),
        ((np.nan, np.nan), Fault.NONE),
        ((2.0, 1.0), Fault.SCALES),
        ((-1.0, 1.0), Fault.SCALES),
        ((0.0, np.inf), Fault.SCALES),
        ((np.nan, -1.0), Fault.SCALES),
    ],
)
def test_scales_are_checked(
    native: Kernels, bits: int, ends: tuple[float, float], fault: Fault
) -> None:
    data = written(Levels(bits), np.ones(300, np.float32))
    wide = np.array(ends, np.float32).view(np.uint32) >> 16
    data[4:8] = wide.astype("<u2").view(np.uint8)
    assert native.check_values(bits, data, 300) is fault
    got = np.empty(300, np.float32)
    assert native.read_values(bits, data, got) is fault


@pytest.mark.parametrize(("bits", "count"), [(2, 129), (2, 130), (2, 131), (4, 129), (4, 1)])
def test_unused_bits_are_checked(native: Kernels, bits: int, count: int) -> None:
    data = written(Levels(bits), np.ones(count, np.float32))
    assert native.check_values(bits, data, count) is Fault.NONE
    for bit in range(count * bits % 8, 8):
        damaged = data.copy()
        damaged[-1] |= 1 << bit
        assert native.check_values(bits, damaged, count) is Fault.UNUSED_BITS


def test_sizes_and_widths_are_checked(native: Kernels) -> None:
    with pytest.raises(ValueError, match="must have 108 elements, got 100"):
        native.write_values(4, np.ones(200, np.float32), np.empty(100, np.uint8))
    with pytest.raises(ValueError, match="bits must be 2, 4, 16 or 32, got 8"):
        native.check_values(8, np.empty(100, np.uint8), 100)
