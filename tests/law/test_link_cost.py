"""What an exchange costs: medians, noise, drift, and a change taken back."""

import json
import math
import random

import pytest

from ds_gradprune.law.link_cost import WINDOW_STEPS, LinkCostState, go_back, observe
from ds_gradprune.law.state import from_plain, to_plain

BYTES = 100_000


def feed(times_s, state=None, *, overhead_s=0.0, wire_bytes=BYTES):
    state = state or LinkCostState()
    drifts = []
    for time_s in times_s:
        state, cost = observe(state, time_s, wire_bytes, overhead_s=overhead_s)
        drifts.append(cost.drift)
    return state, cost, drifts


def noisy(seed, count, sigma, *, stalls=0.0, mean_s=0.1):
    rng = random.Random(seed)
    return [
        mean_s
        * math.exp(sigma * rng.gauss(0.0, 1.0))
        * (rng.uniform(2.0, 4.0) if rng.random() < stalls else 1.0)
        for _ in range(count)
    ]


def test_cost_is_the_median_less_the_overhead() -> None:
    _, cost, _ = feed([0.1, 0.2, 0.11, 0.1, 0.1], overhead_s=0.02)
    assert cost.seconds_per_byte == pytest.approx(0.08 / BYTES, rel=1e-9)
    assert cost.overhead_s == 0.02
    assert cost.samples == 5


def test_overhead_beyond_a_quarter_is_not_believed() -> None:
    _, cost, _ = feed([0.1] * 5, overhead_s=0.09)
    assert cost.overhead_s == pytest.approx(0.025, rel=1e-9)
    assert cost.seconds_per_byte == pytest.approx(0.075 / BYTES, rel=1e-9)


def test_exchanges_of_another_size_do_not_vote() -> None:
    state, _, _ = feed([0.1] * 10)
    _, cost, _ = feed([0.7], state, wire_bytes=4 * BYTES)
    assert cost.samples == 1
    assert cost.seconds_per_byte == pytest.approx(0.7 / (4 * BYTES), rel=1e-9)


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.10])
def test_noise_is_found_whatever_stalls_and_changes_there_are(sigma) -> None:
    found = []
    for seed in range(10):
        times_s = noisy(seed, 150, sigma, stalls=0.02)
        times_s += noisy(seed + 100, 150, sigma, stalls=0.02, mean_s=0.3)
        found.append(feed(times_s)[0].noise)
    # Clipped differences: two of a hundred steps stall, each counts 2.5 twice: up to 10 % too much.
    # The memory of 200 steps leaves 7 % of scatter, the mean of ten runs a third of that.
    assert sum(found) / 10 == pytest.approx(sigma, rel=0.2)


@pytest.mark.parametrize("factor", [1.25, 1.5, 0.8, 0.67])
def test_change_below_the_alarm_is_seen_as_drift(factor) -> None:
    for seed in range(20):
        state, _, drifts = feed(noisy(seed, 100, 0.05))
        assert not any(drifts)
        state, cost, drifts = feed(noisy(seed + 50, 15, 0.05, mean_s=0.1 * factor), state)
        want = "slower" if factor > 1.0 else "faster"
        assert want in drifts
        assert len(state.samples) < 25
        assert cost.seconds_per_byte == pytest.approx(0.1 * factor / BYTES, rel=0.08)


def test_stationary_link_does_not_drift() -> None:
    # Mean time between false alarms 500,000 by the formula; stalls of 2 % shorten it.
    alarms = sum(
        drift is not None
        for seed in range(20)
        for drift in feed(noisy(seed, 1000, 0.05, stalls=0.02))[2]
    )
    assert alarms <= 4


def test_alarm_keeps_what_is_of_the_new_network() -> None:
    state, _, _ = feed([0.1] * 20)
    state, cost = observe(state, 0.5, BYTES, overhead_s=0.0, keep=1)
    assert state.samples == ((BYTES, 0.5),)
    assert cost.samples == 1
    former = ((BYTES, 0.1),) * 20
    state, _, _ = feed([0.5, 0.01, 0.01], state, wire_bytes=1000)
    state, cost = go_back(state, former, 0.0)
    assert len(state.samples) == 22
    assert cost.seconds_per_byte == pytest.approx(0.1 / BYTES, rel=1e-9)


def test_window_is_bounded_and_survives_json() -> None:
    state, _, _ = feed(noisy(3, 100, 0.05))
    assert len(state.samples) == WINDOW_STEPS
    assert from_plain(LinkCostState, json.loads(json.dumps(to_plain(state)))) == state
