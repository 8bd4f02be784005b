"""The law "stepwise", case by case: schedule, decision table, which times count, bounds, state."""

import math

import pytest

from ds_gradprune.config import DensityConfig
from ds_gradprune.controller import kept_per_chunk, start, update
from ds_gradprune.controller.stepwise import LOCAL_WINDOW_STEPS, StepwiseState
from ds_gradprune.errors import CheckpointError
from ds_gradprune.records import CHUNK_NUMEL, Cause
from tests.helpers.control import (
    DENSITY,
    DOWN,
    FALLING,
    RISING,
    UP,
    WINDOW,
    K,
    make_config,
    make_signals,
    make_state,
)

# ---- warm-up and ramp ----------------------------------------------------------------------------


def run_schedule(config, steps):
    """Decisions for steps 1 .. steps, with every signal asking for a change."""
    state, decision = start(config)
    decisions = [decision]
    for step in range(1, steps):
        signals = make_signals(
            step=step,
            timed_density=None if step == 1 else decisions[-2].density,
            step_time_s=9.0,
            loss=float(step),
        )
        state, decision = update(config, state, signals)
        decisions.append(decision)
    assert [d.step for d in decisions] == list(range(1, steps + 1))
    return decisions


def test_warmup_is_dense_for_exactly_its_steps() -> None:
    decisions = run_schedule(make_config(warmup_steps=7, ramp_steps=5), 13)
    assert [d.density for d in decisions[:7]] == [1.0] * 7
    assert {d.cause for d in decisions[:7]} == {Cause.WARMUP}
    assert decisions[6].reason == "warm-up step 7 of 7: dense"
    assert decisions[7].cause is Cause.RAMP
    assert decisions[7].density < 1.0


def test_ramp_falls_geometrically_from_max_to_initial() -> None:
    decisions = run_schedule(make_config(warmup_steps=7, ramp_steps=5), 13)
    ramp = decisions[7:12]
    assert {d.cause for d in ramp} == {Cause.RAMP}
    # 0.25 to 0.05 in 4 equal factors, rounded up to whole elements of 4096.
    expected = [math.ceil(1024 * 0.2 ** (i / 4)) for i in range(5)]
    assert [d.density * CHUNK_NUMEL for d in ramp] == expected
    assert ramp[0].density == 0.25
    assert ramp[-1].density == DENSITY
    assert ramp[-1].reason == "ramp step 5 of 5: density 0.0500"
    assert decisions[12].cause not in (Cause.WARMUP, Cause.RAMP)


def test_windows_fill_during_warmup() -> None:
    config = make_config(warmup_steps=20, step_time_budget_s=None)
    state, _ = start(config)
    for step in range(1, 20):
        state, decision = update(
            config, state, make_signals(step=step, loss=3.0 - 0.1 * step, timed_density=1.0)
        )
        assert decision.cause is Cause.WARMUP
        assert (decision.performance is None) == (step <= WINDOW)
        assert decision.budget_s == pytest.approx(1.1 * (0.15 + 0.01), rel=1e-12)
    assert len(state.local_times_s) == LOCAL_WINDOW_STEPS


def test_without_warmup_and_ramp_the_first_step_is_at_the_initial_density() -> None:
    _, decision = start(make_config())
    assert (decision.step, decision.density, decision.cause) == (1, DENSITY, Cause.RAMP)
    assert decision.reason == "start of pruning: density 0.0500"
    assert decision.performance is None
    assert decision.budget_s == 0.3


def test_without_ramp_the_step_after_warmup_is_at_the_initial_density() -> None:
    decisions = run_schedule(make_config(warmup_steps=3), 5)
    assert [d.density for d in decisions[:4]] == [1.0, 1.0, 1.0, DENSITY]
    assert decisions[3].cause is Cause.RAMP
    assert decisions[4].cause not in (Cause.WARMUP, Cause.RAMP)


def test_ramp_of_one_step_is_at_the_initial_density() -> None:
    decisions = run_schedule(make_config(ramp_steps=1), 2)
    assert decisions[0].density == DENSITY
    assert decisions[1].cause is not Cause.RAMP


def test_nonfinite_step_does_not_stop_the_schedule() -> None:
    config = make_config(warmup_steps=3)
    state, _ = update(config, make_state(CHUNK_NUMEL), make_signals(step=2, nonfinite=True))
    assert state.density == 1.0
    state, decision = update(config, state, make_signals(step=3, nonfinite=True))
    assert decision.density == DENSITY


# ---- the decision table --------------------------------------------------------------------------

MISSED = Cause.PERFORMANCE_MISSED
OVER = Cause.OVER_BUDGET


@pytest.mark.parametrize(
    ("losses", "step_time_s", "expected_k", "cause"),
    [
        # P         step time    density      rule
        (RISING, 0.2, UP, MISSED),
        (RISING, 0.9, UP, MISSED),  # missed performance wins over a missed budget
        (FALLING, 0.9, DOWN, OVER),
        (FALLING, 0.2, K, Cause.HOLD),
        (FALLING, 0.3, K, Cause.HOLD),  # exactly the budget is within it
        ((), 0.9, DOWN, OVER),  # P not known: counts as held
        ((), 0.2, K, Cause.HOLD),
    ],
)
def test_decision_table(losses, step_time_s, expected_k, cause) -> None:
    state = make_state(losses=losses, step_times_s=(step_time_s, step_time_s))
    after, decision = update(make_config(), state, make_signals(step_time_s=step_time_s))
    assert decision.cause is cause
    assert decision.density == expected_k / CHUNK_NUMEL
    assert after.density == decision.density
    assert decision.step == 11
    assert decision.budget_s == 0.3
    assert not decision.network_changed
    assert (decision.performance is None) == (losses == ())


def test_performance_exactly_on_target_holds() -> None:
    config = make_config()
    _, decision = update(config, make_state(losses=(2.5,) * 5), make_signals())
    assert decision.performance == 0.0
    assert decision.cause is Cause.HOLD


def test_target_is_the_users() -> None:
    state = make_state()
    _, decision = update(make_config(performance_target=5.0), state, make_signals())
    assert decision.cause is MISSED
    state = make_state(losses=RISING)
    _, decision = update(make_config(performance_target=-5.0), state, make_signals())
    assert decision.cause is Cause.HOLD


def test_missed_performance_prunes_less_even_without_a_budget() -> None:
    config = make_config(step_time_budget_s=None)
    state = make_state(losses=RISING, step_times_s=())
    signals = make_signals(timed_density=None, compute_time_s=None, step_time_s=None)
    _, decision = update(config, state, signals)
    assert decision.cause is MISSED
    assert decision.budget_s is None


def test_unknown_budget_holds() -> None:
    config = make_config(step_time_budget_s=None)
    state = make_state(step_times_s=(9.0, 9.0))
    _, decision = update(config, state, make_signals(compute_time_s=None, step_time_s=9.0))
    assert decision.cause is Cause.HOLD
    assert decision.density == DENSITY
    assert decision.budget_s is None
    assert decision.reason.endswith("the step time budget is not known yet: hold at 0.0500")


def test_automatic_budget_is_the_median_time_of_own_work_and_a_tenth() -> None:
    config = make_config(step_time_budget_s=None)
    times_s = tuple(0.1 + 0.01 * i for i in range(LOCAL_WINDOW_STEPS))
    state = make_state(local_times_s=times_s)
    after, decision = update(config, state, make_signals(compute_time_s=5.0, codec_time_s=0.5))
    # 16 times: 0.11 .. 0.25 and 5.5, the middle ones 0.18 and 0.19.
    assert decision.budget_s == pytest.approx(1.1 * 0.185, rel=1e-12)
    assert after.local_times_s == (*times_s[1:], 5.5)


# ---- which step times count ----------------------------------------------------------------------


@pytest.mark.parametrize("known", [(), (0.9,)])
def test_over_budget_needs_three_samples(known) -> None:
    state = make_state(step_times_s=known)
    after, decision = update(make_config(), state, make_signals(step_time_s=0.9))
    assert decision.cause is Cause.HOLD
    assert decision.density == DENSITY
    assert f"in {len(known) + 1} of 3 steps" in decision.reason
    assert after.step_times_s == (*known, 0.9)


@pytest.mark.parametrize(
    ("known", "newest", "cause"),
    [
        ((0.2, 0.2), 9.0, Cause.HOLD),  # one outlier
        ((9.0, 0.2), 0.2, Cause.HOLD),
        ((0.2, 0.9), 0.9, OVER),
        ((9.0, 0.9), 0.2, OVER),
        ((9.0, 9.0, 9.0), 0.2, OVER),  # only the last three count: 9.0, 9.0, 0.2
        ((9.0, 0.2, 0.2), 9.0, Cause.HOLD),
    ],
)
def test_median_of_the_last_three_decides(known, newest, cause) -> None:
    state = make_state(step_times_s=known)
    _, decision = update(make_config(), state, make_signals(step_time_s=newest))
    assert decision.cause is cause


def test_times_of_another_density_do_not_count() -> None:
    state = make_state(step_times_s=(0.9, 0.9))
    after, decision = update(make_config(), state, make_signals(2 * K, step_time_s=0.9))
    assert decision.cause is Cause.HOLD
    assert after.step_times_s == (0.9, 0.9)


def test_samples_are_cleared_when_the_density_changes_and_kept_when_not() -> None:
    state = make_state(step_times_s=(0.9, 0.9))
    after, decision = update(make_config(), state, make_signals(step_time_s=0.9))
    assert decision.cause is OVER
    assert after.step_times_s == ()
    after, decision = update(make_config(), make_state(), make_signals())
    assert decision.cause is Cause.HOLD
    assert after.step_times_s == (0.2, 0.2, 0.2)


def test_no_times_no_change() -> None:
    state = make_state(step_times_s=())
    signals = make_signals(timed_density=None, compute_time_s=None, step_time_s=None)
    after, decision = update(make_config(), state, signals)
    assert decision.cause is Cause.HOLD
    assert "no step time at this density yet" in decision.reason
    assert after.local_times_s == ()
    assert after.link == state.link


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, 0.0, -1.0])
def test_unusable_times_do_not_enter_the_windows(bad) -> None:
    state = make_state(local_times_s=(0.1,))
    signals = make_signals(compute_time_s=bad, step_time_s=bad)
    after, decision = update(make_config(), state, signals)
    assert after.step_times_s == state.step_times_s
    assert after.local_times_s == (0.1,)
    assert decision.cause is Cause.HOLD


def test_one_spike_of_the_step_time_never_prunes() -> None:
    config = make_config()
    state = make_state(losses=(), step_times_s=())
    for step in range(10, 60):
        spike = step % 3 == 0
        signals = make_signals(
            step=step, loss=3.0 - 0.01 * step, step_time_s=5.0 if spike else 0.2, comm_time_s=0.04
        )
        state, decision = update(config, state, signals)
        assert decision.density == DENSITY


# ---- non-finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("losses", [FALLING, RISING])
def test_nonfinite_step_changes_nothing_and_says_so(losses) -> None:
    state = make_state(losses=losses, step_times_s=(0.9, 0.9))
    signals = make_signals(nonfinite=True, step_time_s=0.9, loss=1e9)
    after, decision = update(make_config(), state, signals)
    assert decision.cause is Cause.HOLD
    assert decision.density == DENSITY
    assert decision.reason == "a gradient or the loss is not finite: hold at 0.0500"
    assert after.performance == state.performance


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_unusable_loss_does_not_enter_the_window(loss) -> None:
    state = make_state()
    after, decision = update(make_config(), state, make_signals(loss=loss))
    assert after.performance == state.performance
    assert decision.cause is Cause.HOLD


# ---- bounds --------------------------------------------------------------------------------------


def k_of(decision):
    return decision.density * CHUNK_NUMEL


def test_never_above_max() -> None:
    config = make_config(density=DensityConfig(initial=0.05, min=0.01, max=0.06))
    k_max = math.ceil(0.06 * CHUNK_NUMEL)
    state, decision = update(config, make_state(losses=RISING), make_signals())
    assert k_of(decision) == k_max
    state = make_state(k_max, losses=RISING)
    _, decision = update(config, state, make_signals(k_max))
    assert k_of(decision) == k_max
    assert decision.cause is MISSED
    assert decision.reason.endswith("already at density.max, hold at 0.0601")


def test_never_below_min() -> None:
    config = make_config(density=DensityConfig(initial=0.05, min=0.04, max=0.06))
    k_min = math.ceil(0.04 * CHUNK_NUMEL)
    state = make_state(step_times_s=(0.9, 0.9))
    _, decision = update(config, state, make_signals(step_time_s=0.9))
    assert k_of(decision) == k_min
    state = make_state(k_min, step_times_s=(0.9, 0.9))
    _, decision = update(config, state, make_signals(k_min, step_time_s=0.9))
    assert k_of(decision) == k_min
    assert decision.cause is OVER
    assert decision.reason.endswith("already at density.min, hold at 0.0400")


@pytest.mark.parametrize(("k", "bound"), [(3, 41), (4096, 82)])
def test_density_outside_changed_bounds_is_brought_inside(k, bound) -> None:
    # A checkpoint resumed under other bounds: ceil(0.01 * 4096) = 41, ceil(0.02 * 4096) = 82.
    config = make_config(density=DensityConfig(initial=0.01, min=0.01, max=0.02))
    _, decision = update(config, make_state(k), make_signals(k))
    assert decision.cause is Cause.HOLD
    assert k_of(decision) == bound


@pytest.mark.parametrize("k", range(1, 12))
def test_every_step_moves_by_at_least_one_element(k) -> None:
    config = make_config(density=DensityConfig(initial=1e-4, min=1e-4, max=1.0))
    _, decision = update(config, make_state(k, losses=RISING), make_signals(k))
    assert k_of(decision) > k
    state = make_state(k, step_times_s=(0.9, 0.9))
    _, decision = update(config, state, make_signals(k, step_time_s=0.9))
    assert k_of(decision) == max(1, min(k - 1, math.ceil(0.7 * k)))


def test_max_of_one_is_the_dense_path_and_can_be_left() -> None:
    config = make_config(density=DensityConfig(initial=0.05, min=0.001, max=1.0))
    _, decision = update(config, make_state(3000, losses=RISING), make_signals(3000))
    assert decision.density == 1.0
    state = make_state(CHUNK_NUMEL, step_times_s=(0.9, 0.9))
    _, decision = update(config, state, make_signals(CHUNK_NUMEL, step_time_s=0.9))
    assert k_of(decision) == math.ceil(0.7 * CHUNK_NUMEL)


def test_kept_per_chunk() -> None:
    assert kept_per_chunk(1.0) == CHUNK_NUMEL
    assert kept_per_chunk(0.05) == 205
    assert kept_per_chunk(0.25) == 1024
    assert kept_per_chunk(1e-9) == 1
    assert kept_per_chunk(1 - 1e-9) == CHUNK_NUMEL
    for k in range(1, CHUNK_NUMEL + 1):
        assert kept_per_chunk(k / CHUNK_NUMEL) == k
    for bad in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got"):
            kept_per_chunk(bad)


# ---- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        {"density": 2.0},
        {"density": "x"},
        StepwiseState(density=0.5).to_json() | {"local_times_s": 3},
        StepwiseState(density=0.5).to_json() | {"link": {}},
        StepwiseState(density=0.5).to_json() | {"performance": None},
    ],
)
def test_damaged_state_is_refused(data) -> None:
    with pytest.raises(CheckpointError, match="must be"):
        StepwiseState.from_json(data)
