"""Values of 4 and 2 bits: the nearest level, never the wrong way, nothing lost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune.codec.levels import Levels
from ds_gradprune.errors import WireFormatError

pytestmark = pytest.mark.usefixtures("implementation")

BITS = (2, 4)
SHARES = {2: [0.0, 1.0], 4: [n / 128 for n in (0, 10, 22, 36, 53, 74, 98, 128)]}


def written(levels: Levels, values: torch.Tensor) -> np.ndarray:
    out = np.full(levels.nbytes(len(values)), 0xAA, dtype=np.uint8)
    levels.write(values, out)
    return out


def read(levels: Levels, data: np.ndarray, count: int, *, finite: bool = True) -> torch.Tensor:
    levels.check(data, count, finite=finite)
    out = torch.full((count,), 7.0)
    levels.read(data, out)
    return out


def sent(levels: Levels, values: torch.Tensor, *, finite: bool = True) -> torch.Tensor:
    """What every receiver reads."""
    return read(levels, written(levels, values), len(values), finite=finite)


def survivors(numel: int, seed: int = 0) -> torch.Tensor:
    """The largest of a heavy-tailed sample, as selection would leave them, in random order."""
    rng = np.random.default_rng(seed)
    sample = rng.standard_t(4, 50 * numel)
    kept = sample[np.argsort(-np.abs(sample))[:numel]]
    return torch.from_numpy(rng.permutation(kept).astype(np.float32))


def decoded(data: np.ndarray, count: int, bits: int) -> list[float]:
    """The format's description, value by value."""
    if not count:
        return []
    blocks = math.ceil(count / 128)
    ends = torch.from_numpy(data[: 4 * blocks].copy()).view(torch.bfloat16).float().tolist()
    codes = [(byte >> shift) & (1 << bits) - 1
             for byte in data[4 * blocks :].tolist() for shift in range(0, 8, bits)]  # fmt: skip
    assert not any(codes[count:])
    values = []
    for i, code in enumerate(codes[:count]):
        low, high = ends[2 * (i // 128) : 2 * (i // 128) + 2]
        share = np.float32(SHARES[bits][code % (1 << bits - 1)])
        magnitude = np.float32(low) + share * (np.float32(high) - np.float32(low))
        values.append(float(-magnitude if code >> bits - 1 else magnitude))
    return values


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [0, 1, 2, 127, 128, 129, 1000])
def test_bytes_are_those_of_the_description(bits: int, count: int) -> None:
    levels, values = Levels(bits), survivors(count) if count else torch.empty(0)
    data = written(levels, values)
    assert len(data) == 4 * math.ceil(count / 128) + math.ceil(count * bits / 8)
    assert read(levels, data, count).tolist() == decoded(data, count, bits)


@pytest.mark.parametrize("bits", BITS)
def test_spans_leave_no_seam(bits: int) -> None:
    """More values than are rounded at a time: as if each block of 128 had been alone."""
    levels, values = Levels(bits), survivors(1000).repeat(300)
    assert len(values) > 2**18
    whole = sent(levels, values)
    for start in (0, 128 * 500, 2**17 - 128, 2**17, 2**18, len(values) // 128 * 128):
        block = slice(start, start + 128)
        assert torch.equal(sent(levels, values[block]), whole[block])


def test_four_bits_reach_both_ends_and_take_the_nearest_level() -> None:
    values = survivors(128)
    low, high = (float(end.bfloat16()) for end in (values.abs().min(), values.abs().max()))
    all_levels = torch.tensor([low + share * (high - low) for share in SHARES[4]])
    assert high < 15 * low
    distance = (values.abs()[:, None] - all_levels).abs()
    rounded = sent(Levels(4), values)
    assert torch.equal(rounded.sign(), values.sign())
    # The levels above are rounded once, to float32, the codec's own twice.
    nearest = distance.amin(dim=1)
    torch.testing.assert_close((values - rounded).abs(), nearest, rtol=0, atol=high * 2.0**-22)
    # Half of the widest step, 30 / 128, or what bfloat16 takes from the ends.
    assert float(nearest.max()) <= (high - low) * 15 / 128 + high * 2.0**-8


def test_band_is_better_than_a_scale_alone() -> None:
    """The reason for two ends: survivors leave the room below their threshold empty."""
    values = survivors(12800)
    scale = values.view(-1, 128).abs().amax(dim=1, keepdim=True)
    uniform = (values.view(-1, 128) / scale * 7).round() / 7 * scale
    ours = sent(Levels(4), values)
    lost, lost_uniform = (float((values - v.view(-1)).square().sum()) for v in (ours, uniform))
    assert lost < 0.5 * lost_uniform


def test_two_bits_send_the_means_of_the_small_and_of_the_large() -> None:
    magnitudes = torch.tensor([1.0, 1.25] * 32 + [2.0, 2.25] * 32)
    signs = torch.tensor([1.0, -1.0, -1.0]).repeat(43)[:128]
    expected = torch.tensor([1.125] * 64 + [2.125] * 64) * signs
    assert torch.equal(sent(Levels(2), magnitudes * signs), expected)


@pytest.mark.parametrize("bits", BITS)
def test_zero_is_a_level_where_the_band_is_wide(bits: int) -> None:
    values = torch.tensor([1e-6, -1e-3, 0.0, 1.0] * 32)
    rounded = sent(Levels(bits), values).view(-1, 4)
    assert rounded[:, :3].abs().max() == 0.0
    assert bool((rounded[:, 3] == 1.0).all())


magnitude = st.one_of(
    st.floats(0.5, 2.0, width=32),
    st.floats(2.0**-60, 2.0**60, width=32),
    st.sampled_from([0.0, 1.0, 3.0, 15.0, 2.0**-40]),
)


def assert_nothing_lost(values: torch.Tensor, rounded: torch.Tensor) -> None:
    """Sent + residual == value in float32, bit for bit, and in exact arithmetic."""
    residual = values - rounded
    assert torch.equal(rounded + residual, values)
    # q is 0 or within a factor of 256 of x, both have 24 bits: float64 holds their difference.
    assert torch.equal(values.double() - rounded.double(), residual.double())
    assert bool((rounded.abs() <= 2 * values.abs()).all())
    assert bool((rounded * values >= 0).all())
    assert bool((residual.abs() <= values.abs()).all())


@given(
    st.sampled_from(BITS),
    st.lists(st.tuples(magnitude, st.booleans()), min_size=1, max_size=300),
)
def test_nothing_is_lost_and_nothing_overshoots(bits: int, parts: list[tuple[float, bool]]) -> None:
    values = torch.tensor([-size if negative else size for size, negative in parts])
    assert_nothing_lost(values, sent(Levels(bits), values))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_of_survivors(bits: int, seed: int) -> None:
    values = survivors(5000, seed) * 10.0 ** (seed - 2)
    assert_nothing_lost(values, sent(Levels(bits), values))


@pytest.mark.parametrize("bits", BITS)
def test_equal_values_become_their_bfloat16(bits: int) -> None:
    for value in (-1.2345, 0.0):
        values = torch.full((130,), value)
        assert torch.equal(sent(Levels(bits), values), values.bfloat16().float())


@pytest.mark.parametrize("bits", BITS)
def test_largest_numbers_stay_finite(bits: int) -> None:
    largest, beyond = torch.finfo(torch.bfloat16).max, torch.finfo(torch.float32).max
    values = torch.tensor([beyond, -beyond, math.inf, -math.inf] * 40)
    assert sent(Levels(bits), values).tolist() == [largest, -largest] * 80


@pytest.mark.parametrize("bits", BITS)
def test_nan_stays_nan_and_is_refused_where_it_should_not_be(bits: int) -> None:
    values = torch.ones(300)
    values[130] = math.nan
    rounded = sent(Levels(bits), values, finite=False)
    assert rounded[128:256].isnan().all()  # the block that it is in
    assert torch.equal(rounded[:128], torch.ones(128))
    assert torch.equal(rounded[256:], torch.ones(44))
    with pytest.raises(WireFormatError, match="payload's values must be finite unless"):
        sent(Levels(bits), values)


@pytest.mark.parametrize(("bits", "count"), [(4, 3), (2, 3), (2, 129)])
def test_unused_bits_must_be_zero(bits: int, count: int) -> None:
    data = written(Levels(bits), survivors(count))
    Levels(bits).check(data, count, finite=True)
    data[-1] |= 0x80
    with pytest.raises(WireFormatError, match="payload's unused bits must be zeros"):
        Levels(bits).check(data, count, finite=True)


@pytest.mark.parametrize("finite", [False, True])
@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 0.5), (-1.0, 1.0), (0.0, math.inf), (math.inf, math.inf), (-1.0, -1.0)]
)
def test_forged_scales_are_refused(low: float, high: float, finite: bool) -> None:
    data = written(Levels(4), survivors(300))
    ends = torch.tensor([low, high], dtype=torch.bfloat16).view(torch.uint8).numpy()
    data[4:8] = ends
    with pytest.raises(WireFormatError, match="payload's scales must be finite, >= 0 and in order"):
        Levels(4).check(data, 300, finite=finite)
