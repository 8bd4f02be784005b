"""The second actuator: how often islands exchange, with `"sync_every": "auto"`."""

from __future__ import annotations

import functools
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_gradprune import law
from ds_gradprune.bucket.layout import CHUNK_NUMEL, kept_per_chunk
from ds_gradprune.config import INTERVALS, DensityConfig, GradientPruningConfig
from ds_gradprune.law import interval as intervals
from ds_gradprune.law.decision import Cause
from ds_gradprune.law.prices import Prices, ladder
from ds_gradprune.law.progress_model import best_k, steps_factor
from tests.helpers.simulated_law import CODEC_S, COMPUTE_S, MBIT, OVERHEAD_S
from tests.helpers.simulated_rounds import IslandRun, make_config

RATES = [200 * MBIT, 20 * MBIT, 2 * MBIT, 0.5 * MBIT, 0.2 * MBIT]


def auto(**fields: Any) -> GradientPruningConfig:
    return make_config(sync_every="auto", **fields)


def settled(rate: float, *, seed: int = 0, noise: float = 0.05, **fields: Any) -> IslandRun:
    return IslandRun(auto(**fields), seed=seed, noise=noise).exchanges(100, rate)


# ---- where it goes -------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", ["auto", False])
def test_interval_is_the_shortest_that_affords_the_floor(overlap: Any) -> None:
    found = [settled(rate, overlap=overlap) for rate in RATES]
    assert [run.interval for run in found] == sorted(run.interval for run in found)
    assert found[0].interval == intervals.EASIEST
    assert found[-1].interval >= 16
    for run in found:
        late = [step_s for _, step_s in run.steps_s[-30:] if step_s > 0.3]
        assert len(late) <= 3
        if intervals.EASIEST < run.interval < INTERVALS[-1]:
            assert run.k >= 0.97 * intervals.FLOOR * CHUNK_NUMEL
            assert run.k <= 4 * intervals.FLOOR * CHUNK_NUMEL


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("budget_s", [0.3, None])
def test_nothing_moves_on_an_unchanged_link(rate: float, budget_s: float | None) -> None:
    run = settled(rate, noise=0.1, step_time_budget_s=budget_s)
    # Without a budget the density falls as the run grows older, and the interval may follow.
    run.exchanges(200, rate)
    last = run.decisions[-100:]
    assert len({d.interval for d in last}) == 1
    if budget_s is not None:
        assert len({d.density for d in last}) == 1


def test_slower_link_is_in_budget_at_once_and_in_its_interval_soon() -> None:
    run = settled(20 * MBIT)
    first = len(run.decisions)
    run.exchanges(20, MBIT)
    assert [step_s <= 0.31 for _, step_s in run.steps_s[first + 4 :]] == [True] * 15
    assert run.interval == 16
    moves = [d for d in run.decisions[first:] if d.cause is not Cause.HOLD]
    assert len(moves) <= 4
    assert "alone fits every 4 steps: every 4 -> 8 steps, density" in moves[0].reason


def test_faster_link_fills_its_budget_and_shortens_the_interval() -> None:
    run = settled(MBIT)
    before = run.interval
    run.exchanges(20, 20 * MBIT)
    assert before == 16
    assert run.interval == 4
    assert 0.27 <= run.steps_s[-1][1] <= 0.3


@pytest.mark.parametrize("overlap", ["auto", False])
@pytest.mark.parametrize("rate", RATES)
def test_without_a_budget_another_interval_would_learn_hardly_faster(
    rate: float, overlap: Any
) -> None:
    run = settled(rate, noise=0.01, step_time_budget_s=None, overlap=overlap)
    run.exchanges(100, rate)
    line = Prices(COMPUTE_S, 0.0, CODEC_S, 0.0, 0.0, OVERHEAD_S, 1.0 / rate, 0.01, 5e3, 850.0, 0, 1)

    def learning_s(interval: int) -> float:
        prices = line.at(interval, run.config.delay_of(interval))
        k = best_k(prices, "update", run.step, 3, 1024, dense_share=0.0, interval=interval)
        return prices.step_s(k) * steps_factor("update", k, run.step, interval)

    best_s = min(map(learning_s, INTERVALS))
    assert learning_s(run.interval) <= 1.12 * best_s  # two octaves of a twentieth each
    budget_s = run.decisions[-1].budget_s
    assert budget_s is not None
    assert run.steps_s[-1][1] <= 1.03 * budget_s


def test_hidden_exchange_needs_no_longer_interval() -> None:
    hidden, waited = (settled(2 * MBIT, overlap=overlap) for overlap in ("auto", False))
    assert hidden.interval < waited.interval
    assert hidden.k / hidden.interval > waited.k / waited.interval


def test_pinned_density_moves_the_interval_alone() -> None:
    pinned = DensityConfig(initial=0.05, min=0.05, max=0.05)
    found = [settled(rate, density=pinned) for rate in RATES]
    assert {run.k for run in found} == {kept_per_chunk(0.05)}
    assert [run.interval for run in found] == sorted(run.interval for run in found)
    assert len({run.interval for run in found}) >= 3


# ---- the loss ------------------------------------------------------------------------------------


def test_loss_arm_shortens_the_interval_first_and_sends_more_then() -> None:
    run = IslandRun(auto(), noise=0.02).exchanges(100, MBIT, lambda _: 2.0)
    run.exchanges(60, MBIT, run.plateau)
    before, first, begin = run.interval, len(run.decisions), run.step

    def rising(step: int) -> float:
        return run.plateau(step) + 0.01 * (step - begin)

    run.exchanges(60, MBIT, rising)
    raises = run.raises(first)
    assert before == 16
    assert raises[0].interval == 8
    assert "every 16 -> 8 steps" in raises[0].reason
    used = [d.interval for d in run.decisions[first:]]
    until = next(i for i, d in enumerate(run.decisions[first:]) if d is raises[-1])
    assert used[: until + 1] == sorted(used[: until + 1], reverse=True)  # never longer meanwhile


def test_doublings_are_twice_the_bytes_per_step() -> None:
    config = auto()
    for times, interval in itertools.product(range(4), INTERVALS):
        k, shorter = intervals.raised(config, 120, interval, times)
        assert k / shorter == pytest.approx(120 / interval * 2**times)
        assert shorter == interval or shorter >= intervals.EASIEST


@given(
    st.sampled_from(INTERVALS), st.sampled_from(INTERVALS), st.sampled_from([*range(3, 1025), 4096])
)
def test_way_to_an_interval_goes_octave_by_octave(wanted: int, used: int, k: int) -> None:
    steps = 0
    while used != wanted:
        then, near = intervals.one_octave(auto(), k, wanted, used)
        assert near in (used // 2, 2 * used)
        assert then == k if near == wanted or k == CHUNK_NUMEL else 3 <= then <= 1024
        used, steps = near, steps + 1
    assert steps <= 5


# ---- properties ----------------------------------------------------------------------------------


def _same(loss: float, _: int) -> float:
    return loss


moments = st.lists(
    st.tuples(
        st.sampled_from([0.05, 0.5, 2.0, 20.0, 400.0]),
        st.sampled_from([1.0, 1.0, 3.0]),
        st.floats(-2.0, 8.0),
        st.booleans(),
    ),
    min_size=5,
    max_size=60,
)


@st.composite
def configs(draw: st.DrawFn) -> GradientPruningConfig:
    most = draw(st.sampled_from([0.01, 0.25]))
    return auto(
        step_time_budget_s=draw(st.sampled_from([None, 0.21, 0.3, 2.0])),
        overlap=draw(st.sampled_from(["auto", False])),
        warmup=draw(st.sampled_from(["dense", "unpruned"])),
        warmup_steps=draw(st.integers(0, 5)),
        ramp_steps=3,
        window_size=8,
        density=DensityConfig(initial=min(0.05, most), min=0.0005, max=most),
    )


@settings(deadline=None, max_examples=60)
@given(configs(), moments, st.integers(0, 2**16))
def test_every_decision_is_in_range_one_octave_away_and_goes_on_alike_after_json(
    config: GradientPruningConfig, course: list[tuple[float, float, float, bool]], seed: int
) -> None:
    run = IslandRun(config, seed=seed, noise=0.1)
    for rate, stall, loss, bad in course:
        before = run.state
        run.state = law.restore(config, json.loads(json.dumps(law.to_plain(before))))
        assert run.state == before
        used = run.interval
        decision = run.exchange(
            rate * MBIT, functools.partial(_same, loss), stall=stall, nonfinite=bad and loss > 7.0
        )
        assert decision.interval in INTERVALS
        assert decision.interval in (used // 2, used, 2 * used)
        assert decision.step > run.step
        k = round(decision.density * CHUNK_NUMEL)
        assert k == CHUNK_NUMEL or 3 <= k <= kept_per_chunk(config.density.max)
        if decision.interval > used:
            assert decision.cause is not Cause.PERFORMANCE_MISSED
        assert "\n" not in decision.reason


def test_resume_with_another_interval_takes_the_one_that_is_configured() -> None:
    saved = law.to_plain(settled(MBIT).state)
    fixed = make_config(sync_every=5)
    assert intervals.inside(fixed, 16) == 5
    run = IslandRun(fixed)
    run.state = law.restore(fixed, saved)
    run.step = 2000
    assert run.exchange(MBIT).interval == 5
    assert [intervals.inside(auto(), every) for every in (1, 3, 5, 31, 100)] == [1, 2, 4, 16, 32]


# ---- what an interval costs ----------------------------------------------------------------------

PRICES = Prices(0.2, 0.0, 0.02, 1e-5, 0.0, 0.005, 1e-6, 0.05, 5e3, 850.0, 4e6, 1.0)


@pytest.mark.parametrize("hide_steps", [0, 1, 4])
@pytest.mark.parametrize("seconds_per_byte", [1e-8, 1e-7, 1e-6, 1e-5])
@pytest.mark.parametrize("interval", INTERVALS)
def test_best_density_at_an_interval_is_the_best_of_all(
    interval: int, seconds_per_byte: float, hide_steps: int
) -> None:
    prices = PRICES._replace(seconds_per_byte=seconds_per_byte)
    prices = prices.at(interval, min(interval, hide_steps))

    def learning_s(k: int) -> float:
        return prices.step_s(k) * steps_factor("update", k, 1000, interval)

    found = best_k(prices, "update", 1000, 4, 1024, dense_share=0.0, interval=interval)
    least_s = min(learning_s(ladder(k)) for k in range(4, 1025))
    assert learning_s(found) <= 1.01 * least_s


def test_interval_costs_what_was_measured() -> None:
    factors = {every: steps_factor("update", 128, 10**6, every) for every in INTERVALS}
    assert min(factors, key=lambda every: factors[every]) == 4
    # 1.54 - 0.72 % of loss, a tenth of a step each.
    assert factors[16] - factors[4] == pytest.approx(0.082, abs=1e-5)
    assert factors[32] > 1.3 > factors[16]


def test_exposed_time_is_priced() -> None:
    waited = PRICES.at(16, 0)
    hidden = PRICES.at(16, 4)
    wire_s = PRICES.comm_s(400)
    assert waited.step_s(400) == pytest.approx(0.2 + (0.02 + 1e-5 * 400 + wire_s) / 16)
    assert hidden.step_s(400) == pytest.approx(0.2 + (0.024 + max(0.0, wire_s - 0.8)) / 16)
    assert hidden.affordable_k(0.21, 1, 4095) > waited.affordable_k(0.21, 1, 4095)
