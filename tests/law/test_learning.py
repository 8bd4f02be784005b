"""P(t): its formula, its properties and its degenerate cases."""

import json
import math
import random
import statistics

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ds_gradprune.law.learning import LossWindow, noise, observe, recent
from ds_gradprune.law.state import from_plain, to_plain

FORMS = ("edge", "literal")


def feed(losses, *, window_size=8, form="edge"):
    """The state and P after all losses."""
    state, p = LossWindow(), None
    for loss in losses:
        state, p = observe(state, loss, window_size=window_size, form=form)
    return state, p


def reference(losses, window_size, edge_numel):
    """The formula as the module's docstring prints it, index by index."""
    t = len(losses) - 1
    last = [losses[i] for i in range(t - window_size + 1, t + 1)]
    first_edge = [losses[t - window_size + i] for i in range(edge_numel)]
    last_edge = [losses[t - i] for i in range(edge_numel)]
    mean = sum(last) / window_size
    return (sum(first_edge) - sum(last_edge)) / edge_numel / (mean - min(last))


finite_losses = st.lists(st.floats(-100.0, 100.0, allow_nan=False), min_size=34, max_size=40)


@settings(deadline=None, max_examples=60)
@given(finite_losses, st.sampled_from([4, 5, 8, 16, 33]))
def test_matches_the_printed_formula(losses, window_size) -> None:
    last = losses[-window_size:]
    # Away from the flat case and the clamp, both of which have tests of their own.
    assume(math.fsum(last) / window_size - min(last) > 1e-2)
    for form, edge_numel in (("literal", 1), ("edge", window_size // 4)):
        _, p = feed(losses, window_size=window_size, form=form)
        expected = max(-10.0, min(10.0, reference(losses, window_size, edge_numel)))
        # Sums of 33 values up to 100 err by 33 * 100 * 2^-52 < 1e-12, divided by at least 1e-2.
        assert p == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(finite_losses, st.sampled_from([4, 5, 6, 7]))
def test_edge_with_edges_of_one_is_the_literal_form(losses, window_size) -> None:
    for cut in range(len(losses)):
        _, edge = feed(losses[: cut + 1], window_size=window_size, form="edge")
        _, literal = feed(losses[: cut + 1], window_size=window_size, form="literal")
        assert edge == literal


@pytest.mark.parametrize("slope", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("window_size", [4, 8, 32, 128, 1024])
def test_clean_linear_descent(window_size, slope) -> None:
    # L(i) = c - slope * i. Fall over M steps: M * slope (literal); between the edge means, whose
    # centres lie M + 1 - w steps apart: (M + 1 - w) * slope. mean - min of the last M losses:
    # slope * (M - 1) / 2.
    losses = [100.0 - slope * i for i in range(window_size + 1)]
    edge_numel = window_size // 4
    _, literal = feed(losses, window_size=window_size, form="literal")
    _, edge = feed(losses, window_size=window_size, form="edge")
    assert literal == pytest.approx(2 * window_size / (window_size - 1), rel=1e-9)
    assert edge == pytest.approx(2 * (window_size + 1 - edge_numel) / (window_size - 1), rel=1e-9)
    if window_size >= 128:
        # The exact values differ from 2 and 1.5 by 2/(M-1) and 3.5/(M-1) < 0.03 at most.
        assert literal == pytest.approx(2.0, abs=0.03)
        assert edge == pytest.approx(1.5, abs=0.03)


@pytest.mark.parametrize("form", FORMS)
def test_plateau_is_zero(form) -> None:
    _, p = feed([2.5] * 20, form=form)
    assert p == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_noisy_plateau_is_zero_on_average(form) -> None:
    rng = random.Random(0)
    values = []
    for _ in range(40):
        _, p = feed([3.0 + rng.gauss(0.0, 0.05) for _ in range(129)], window_size=128, form=form)
        values.append(p)
    # Independent windows. Std of one P: sqrt(2/w) sigma / (2.6 sigma) = 0.1 (edge, w = 32), 0.55
    # (literal); 5 sigma of a mean of 40 is 0.8 of that.
    assert abs(sum(values) / len(values)) < 0.8 * {"edge": 0.1, "literal": 0.55}[form]


def test_edge_is_less_noisy_than_literal() -> None:
    rng = random.Random(1)
    spread = {}
    windows = [[3.0 + rng.gauss(0.0, 0.05) for _ in range(129)] for _ in range(60)]
    for form in FORMS:
        values = [feed(losses, window_size=128, form=form)[1] for losses in windows]
        spread[form] = math.sqrt(sum(p * p for p in values) / len(values))
    # sqrt(32) = 5.7 times in expectation; two standard deviations estimated from 60 values each err
    # by 10 % or so, so 3 is far outside chance.
    assert spread["literal"] > 3.0 * spread["edge"]


@pytest.mark.parametrize("form", FORMS)
def test_rise_is_negative(form) -> None:
    _, p = feed([1.0 + 0.01 * i for i in range(9)], form=form)
    assert p is not None
    assert p < -1.0


@pytest.mark.parametrize("form", FORMS)
def test_spike_is_strongly_negative_at_once(form) -> None:
    # M = 32, flat at 3 but for one low loss that gives a spread, then one loss of 9. Last 32: one
    # 2.9, one 9, thirty of 3: mean 3.184, spread 0.284. Literal: -6 / 0.284 = -21, clamped. Edge,
    # w = 8: -(6 / 8) / 0.284 = -2.6.
    losses = [3.0] * 16 + [2.9] + [3.0] * 15 + [9.0]
    _, p = feed(losses, window_size=32, form=form)
    assert p == pytest.approx(
        {"literal": -10.0, "edge": -0.75 / (90 + 2.9 + 9 - 2.9 * 32) * 32}[form]
    )


@settings(deadline=None, max_examples=60)
@given(
    finite_losses,
    st.floats(1e-3, 1e3),
    st.floats(-1e3, 1e3),
    st.sampled_from(FORMS),
)
def test_scaling_and_shifting_the_loss_changes_nothing(losses, scale, shift, form) -> None:
    last = losses[-16:]
    spread = math.fsum(last) / 16 - min(last)
    moved = [scale * loss + shift for loss in losses]
    # Away from the flat threshold, which is absolute by design: 1e-6 of |mean| <= 101e3 is 0.101.
    assume(spread > 1e-2 and scale * spread > 1.0)
    _, before = feed(losses, window_size=16, form=form)
    _, after = feed(moved, window_size=16, form=form)
    # Values up to 1e5 rounded to 2^-53 of themselves, relative to a spread above 1: 1e-11 each;
    # before moving, values up to 100 over 1e-2: 1e-12.
    assert after == pytest.approx(before, abs=1e-7, rel=1e-7)


def test_unknown_until_the_window_and_one_more() -> None:
    losses = [3.0 - 0.1 * i for i in range(9)]
    assert feed(losses[:8], window_size=8)[1] is None
    assert feed(losses, window_size=8)[1] is not None


def test_keeps_the_last_losses_only() -> None:
    state, _ = feed([float(i) for i in range(50)], window_size=8)
    assert state.losses == tuple(float(i) for i in range(41, 50))


def test_smaller_window_uses_the_newest_losses() -> None:
    state, _ = feed([float(i % 7) for i in range(50)], window_size=16)
    _, p = observe(state, None, window_size=8, form="edge")
    assert p == feed([float(i % 7) for i in range(41, 50)], window_size=8)[1]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, 1e308])
@pytest.mark.parametrize("form", FORMS)
def test_unusable_loss_does_not_enter_the_window(bad, form) -> None:
    state, p = feed([3.0 - 0.1 * i for i in range(9)], form=form)
    after, p_after = observe(state, bad, window_size=8, form=form)
    assert after == state
    assert p_after == p


def test_spread_below_rounding_is_zero() -> None:
    # Mean 1000: the threshold is 1e-3. Alternating by 1e-3 has mean - min = 5e-4.
    below = [1000.0 + 1e-3 * (i % 2) for i in range(9)]
    above = [1000.0 + 1e-2 * (i % 2) for i in range(8)] + [999.0]
    assert feed(below, form="literal")[1] == 0.0
    assert feed(above, form="literal")[1] != 0.0


def test_clamped_at_both_ends() -> None:
    assert feed([1000.0] + [1.0 + 0.1 * (i % 2) for i in range(8)], form="literal")[1] == 10.0
    assert feed([-1000.0] + [1.0 + 0.1 * (i % 2) for i in range(8)], form="literal")[1] == -10.0


def test_extreme_losses_stay_finite() -> None:
    for form in FORMS:
        _, p = feed([1e100 * (-1) ** i for i in range(9)], form=form)
        assert p is not None
        assert math.isfinite(p)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e100, 1e100), max_size=40))
def test_state_survives_json_exactly(losses) -> None:
    state, _ = feed(losses, window_size=16)
    assert from_plain(LossWindow, json.loads(json.dumps(to_plain(state)))) == state


# ---- noise, and the newest losses alone ----------------------------------------------------------


@pytest.mark.parametrize("form", ["edge", "literal"])
@pytest.mark.parametrize("window_size", [8, 32, 64, 128, 256])
def test_noise_is_what_a_plateau_shows(form, window_size) -> None:
    rng = random.Random(window_size)
    values = []
    for _ in range(400):
        losses = tuple(2.0 + 0.05 * rng.gauss(0.0, 1.0) for _ in range(window_size + 1))
        value = recent(LossWindow(losses), window_size + 1, form=form)
        assert value is not None
        values.append(value)
    # 400 values: their standard deviation errs by 1 / sqrt(800) = 3.5 %; the expansion for the
    # largest of M normals is good to 4 % from M = 32 on, to 15 % at 8, where the denominator
    # scatters as well.
    allowed = 0.35 if window_size == 8 else 0.15
    assert statistics.pstdev(values) == pytest.approx(noise(window_size, form), rel=allowed)


def test_noise_of_the_edge_form_falls_with_the_window() -> None:
    found = [round(noise(m, "edge"), 2) for m in (32, 64, 128, 256)]
    assert found == [0.23, 0.15, 0.09, 0.06]


def test_recent_is_the_form_on_a_smaller_window() -> None:
    losses = tuple(5.0 - 0.1 * i for i in range(40))
    state = LossWindow(losses)
    small = LossWindow(losses[-17:])
    _, expected = observe(small, None, window_size=16, form="edge")
    assert recent(state, 17, form="edge") == expected
    assert recent(state, 41, form="edge") is None
