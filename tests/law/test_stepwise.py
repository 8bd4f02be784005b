"""The law "stepwise": the decision table, which times count, the network, and whole runs.

Longer than 300 lines: one table of decisions, and the runs that pass through it.
"""

import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_gradprune import law
from ds_gradprune.bucket.layout import CHUNK_NUMEL, kept_per_chunk
from ds_gradprune.config import DensityConfig, GradientPruningConfig
from ds_gradprune.law.alarm import AlarmState, watch
from ds_gradprune.law.decision import Cause
from ds_gradprune.law.learning import LossWindow
from ds_gradprune.law.signals import StepSignals
from ds_gradprune.law.step_times import LOCAL_STEPS
from ds_gradprune.law.stepwise import StepwiseState, start, update
from tests.helpers import simulated_law as sim

K = 205  # density 0.05
UP, DOWN = math.ceil(K / 0.7), math.ceil(K * 0.7)
FALLING = (3.0, 2.9, 2.8, 2.7, 2.6)  # P after one more loss of 2.5: held
RISING = (2.0, 2.1, 2.2, 2.3, 2.4)  # P after one more loss of 2.5: missed
MISSED, OVER, CHANGED = Cause.PERFORMANCE_MISSED, Cause.OVER_BUDGET, Cause.NETWORK_CHANGED


def make_config(**fields):
    base = {
        "prune": "gradient",
        "controller": "stepwise",
        "warmup_steps": 0,
        "ramp_steps": 0,
        "window_size": 4,
        "step_time_budget_s": 0.3,
        "density": DensityConfig(initial=0.05, min=0.001, max=0.25),
    }
    return GradientPruningConfig(**(base | fields))


def make_state(k=K, *, losses=FALLING, step_times_s=(0.2, 0.2), **fields):
    return StepwiseState(k / CHUNK_NUMEL, LossWindow(losses), step_times_s=step_times_s, **fields)


def make_signals(k=K, **fields):
    base = {
        "step": 10,
        "loss": 2.5,
        "nonfinite": False,
        "timed_density": k / CHUNK_NUMEL,
        "compute_time_s": 0.15,
        "codec_time_s": 0.01,
        "comm_time_s": 0.04,
        "step_time_s": 0.2,
        "wire_bytes": 100_000,
        "dense_bytes": 2_000_000,
    }
    return StepSignals(**(base | fields))


def decide(state=None, config=None, k=K, **signals):
    return update(config or make_config(), state or make_state(k), make_signals(k, **signals))


def k_of(decision):
    return round(decision.density * CHUNK_NUMEL)


# ---- the decision table --------------------------------------------------------------------------


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
    after, decision = decide(state, step_time_s=step_time_s)
    assert decision.cause is cause
    assert k_of(decision) == expected_k
    assert after.density == decision.density
    assert decision.step == 11
    assert decision.budget_s == 0.3
    assert not decision.network_changed
    assert (decision.performance is None) == (losses == ())


def test_warm_up_and_ramp_go_by_the_step_alone() -> None:
    config = make_config(warmup_steps=3, ramp_steps=2)
    state, first = start(config)
    decisions = [first]
    for step in range(1, 7):  # every signal asks for a change, and some are not finite
        signals = make_signals(step=step, step_time_s=9.0, loss=float(step), nonfinite=step == 2)
        state, decision = update(config, state, signals)
        decisions.append(decision)
    assert [k_of(d) for d in decisions[:5]] == [4096, 4096, 4096, 1024, K]
    assert decisions[5].cause not in (Cause.WARMUP, Cause.RAMP)
    assert len(state.local_times_s) == 6  # the windows fill meanwhile


def test_target_is_the_users() -> None:
    assert decide(config=make_config(performance_target=5.0))[1].cause is MISSED
    state = make_state(losses=RISING)
    assert decide(state, make_config(performance_target=-5.0))[1].cause is Cause.HOLD
    _, decision = decide(make_state(losses=(2.5,) * 5))
    assert (decision.performance, decision.cause) == (0.0, Cause.HOLD)


def test_automatic_budget_is_a_tenth_above_the_median_of_own_work() -> None:
    config = make_config(step_time_budget_s=None)
    times_s = tuple(0.1 + 0.01 * i for i in range(LOCAL_STEPS))
    state = make_state(local_times_s=times_s)
    after, decision = decide(state, config, compute_time_s=5.0, codec_time_s=0.5)
    # 16 times: 0.11 .. 0.25 and 5.5, the middle ones 0.18 and 0.19.
    assert decision.budget_s == pytest.approx(1.1 * 0.185, rel=1e-12)
    assert after.local_times_s == (*times_s[1:], 5.5)
    unknown = {"compute_time_s": None, "step_time_s": 9.0}
    assert decide(make_state(step_times_s=(9.0,)), config, **unknown)[1].cause is Cause.HOLD


@pytest.mark.parametrize("losses", [FALLING, RISING])
def test_step_that_is_not_finite_changes_nothing_and_says_so(losses) -> None:
    state = make_state(losses=losses, step_times_s=(0.9, 0.9))
    after, decision = decide(state, nonfinite=True, step_time_s=0.9, loss=1e9)
    assert decision.reason == "a gradient or the loss is not finite: hold at 5.00 %"
    assert k_of(decision) == K
    assert after.window == state.window


def test_reasons_carry_the_numbers() -> None:
    _, decision = decide()
    assert decision.reason == "P 2.67 >= target 0, step 0.200 s within 0.300 s: hold at 5.00 %"
    _, decision = decide(make_state(losses=RISING))
    assert decision.reason == "P -2.67 misses its target 0: density 5.00 % -> 7.15 %"
    _, decision = decide(make_state(step_times_s=(0.9, 0.9)), step_time_s=0.9)
    assert decision.reason == "step 0.900 s over the budget of 0.300 s: density 5.00 % -> 3.52 %"


# ---- which step times count ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "newest", "cause"),
    [
        ((), 0.9, Cause.HOLD),  # three are wanted
        ((0.9,), 0.9, Cause.HOLD),
        ((0.2, 0.2), 9.0, Cause.HOLD),  # one outlier
        ((0.2, 0.9), 0.9, OVER),
        ((9.0, 0.9), 0.2, OVER),
        ((9.0, 0.2, 0.2), 9.0, Cause.HOLD),  # the last three count
    ],
)
def test_median_of_three_decides(known, newest, cause) -> None:
    after, decision = decide(make_state(step_times_s=known), step_time_s=newest)
    assert decision.cause is cause
    assert after.step_times_s == (() if cause is OVER else (*known, newest)[-3:])


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, 0.0, -1.0])
def test_unusable_times_and_times_of_another_density_do_not_count(bad) -> None:
    state = make_state(local_times_s=(0.1,))
    after, decision = decide(state, compute_time_s=bad, step_time_s=bad)
    assert after.step_times_s == state.step_times_s
    assert after.local_times_s == (0.1,)
    assert decision.cause is Cause.HOLD
    state = make_state(step_times_s=(0.9, 0.9))
    after, decision = decide(state, timed_density=0.5, step_time_s=0.9)
    assert after.step_times_s == (0.9, 0.9)


# ---- bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 5, 11])
def test_every_move_is_of_one_element_at_least(k) -> None:
    config = make_config(density=DensityConfig(initial=1e-4, min=1e-4, max=1.0))
    assert k_of(decide(make_state(k, losses=RISING), config, k)[1]) > k
    state = make_state(k, step_times_s=(0.9, 0.9))
    assert k_of(decide(state, config, k, step_time_s=0.9)[1]) == max(1, min(k - 1, -(-7 * k // 10)))


def test_density_stays_within_its_bounds() -> None:
    config = make_config(density=DensityConfig(initial=0.05, min=0.04, max=0.06))
    k_min, k_max = math.ceil(0.04 * 4096), math.ceil(0.06 * 4096)
    for k in (K, k_max):
        assert k_of(decide(make_state(k, losses=RISING), config, k)[1]) == k_max
    for k in (K, k_min):
        state = make_state(k, step_times_s=(0.9, 0.9))
        assert k_of(decide(state, config, k, step_time_s=0.9)[1]) == k_min
    # A checkpoint that is resumed under other bounds.
    assert k_of(decide(make_state(3), config, 3)[1]) == k_min
    assert k_of(decide(make_state(4096), config, 4096)[1]) == k_max


# ---- a change of the network ---------------------------------------------------------------------


def alarmed(last_s):
    """An alarm that a next exchange of so many seconds raises; it was 0.04 s before."""
    state = AlarmState()
    for time_s in [0.04] * 12 + [last_s]:
        state, change = watch(state, time_s, 100_000)
        assert change is None
    return state


def test_faster_network_prunes_less_while_it_fits() -> None:
    # 4 ms for 100 kB: a step up costs 2 ms more at most, and 100 ms are free.
    state, decision = decide(make_state(alarm=alarmed(0.004)), comm_time_s=0.004)
    assert (decision.cause, k_of(decision)) == (CHANGED, UP)
    assert decision.network_changed
    assert state.change == "faster"
    assert "0.002 s more on the faster link" in decision.reason
    assert decision.reason.endswith("; exchanges became faster")
    state, decision = decide(state, k=UP, comm_time_s=0.004)  # and on, without another alarm
    assert (decision.cause, k_of(decision)) == (CHANGED, math.ceil(UP / 0.7))
    assert not decision.network_changed


def test_rise_ends_where_the_next_step_would_not_fit() -> None:
    # 200 ms for 100 kB: a step up costs 86 ms more, and 50 ms are free.
    state = make_state(change="faster", step_times_s=(0.25,))
    state, decision = decide(state, comm_time_s=0.2, step_time_s=0.25)
    assert (decision.cause, state.change) == (Cause.HOLD, "faster")  # one may be an outlier
    state, decision = decide(state, comm_time_s=0.2, step_time_s=0.25)
    assert (decision.cause, state.change) == (Cause.HOLD, None)
    assert "and 0.086 s more at 7.15 %: hold at 5.00 %" in decision.reason


@pytest.mark.parametrize(
    ("k", "fields", "signals", "cause", "change"),
    [
        (1024, {}, {}, Cause.HOLD, None),  # at density.max
        (K, {"step_times_s": (0.9, 0.9)}, {"step_time_s": 0.9}, OVER, None),
        (K, {"losses": RISING}, {}, MISSED, "faster"),
        (K, {}, {"timed_density": 0.5}, Cause.HOLD, "faster"),  # no time at this density
        (K, {}, {"nonfinite": True}, Cause.HOLD, "faster"),
    ],
)
def test_what_becomes_of_the_rise(k, fields, signals, cause, change) -> None:
    state, decision = decide(make_state(k, change="faster", **fields), k=k, **signals)
    assert (decision.cause, state.change) == (cause, change)


@pytest.mark.parametrize(("dense_bytes", "k_next"), [(150_000, CHUNK_NUMEL), (250_000, 3000)])
def test_step_up_to_dense_is_judged_by_the_dense_bytes(dense_bytes, k_next) -> None:
    # 100 kB take 0.1 s, and 0.1 s are free.
    config = make_config(density=DensityConfig(initial=0.05, min=0.001, max=1.0))
    state = make_state(3000, change="faster")
    _, decision = decide(state, config, 3000, comm_time_s=0.1, dense_bytes=dense_bytes)
    assert k_of(decision) == k_next


def test_slower_network_prunes_more_on_a_single_time_until_it_fits() -> None:
    state = make_state(alarm=alarmed(0.4), step_times_s=(0.2, 0.2))  # of the former network
    state, decision = decide(state, comm_time_s=0.4, step_time_s=0.56)
    assert (decision.cause, k_of(decision)) == (OVER, DOWN)
    assert (decision.network_changed, state.change) == (True, "slower")
    assert decision.reason.endswith("density 5.00 % -> 3.52 %; exchanges became slower")
    state, decision = decide(state, k=DOWN, comm_time_s=0.3, step_time_s=0.46)
    assert decision.cause is OVER
    k = k_of(decision)
    state, decision = decide(state, k=k, comm_time_s=0.1, step_time_s=0.26)
    assert (decision.cause, state.change) == (Cause.HOLD, None)
    assert decide(state._replace(step_times_s=()), k=k, step_time_s=0.9)[1].cause is Cause.HOLD


def test_change_is_told_whatever_the_rule_and_forgotten_in_warm_up() -> None:
    for fields, signals in (({"losses": RISING}, {}), ({}, {"nonfinite": True})):
        state = make_state(alarm=alarmed(0.4), **fields)
        _, decision = decide(state, comm_time_s=0.4, **signals)
        assert decision.network_changed
        assert "; exchanges became slower" in decision.reason
    state = make_state(alarm=alarmed(0.004))
    after, decision = decide(state, make_config(warmup_steps=100), comm_time_s=0.004)
    assert decision.network_changed
    assert after.change is None


# ---- properties ----------------------------------------------------------------------------------

times = st.one_of(st.none(), st.floats(1e-6, 1e3), st.just(math.nan), st.just(math.inf))
observations = st.tuples(
    st.one_of(st.none(), st.floats(-1e6, 1e6), st.just(math.nan)),  # loss
    st.booleans(),  # nonfinite
    times,  # compute
    times,  # step
    st.one_of(st.floats(0.0, 1e3), st.just(math.inf)),  # comm
    st.integers(0, 10**9),  # wire bytes
)


@settings(deadline=None, max_examples=60)
@given(st.lists(observations, min_size=1, max_size=60), st.booleans(), st.integers(0, 59))
def test_pure_in_range_and_alike_after_json(history, is_automatic, cut) -> None:
    config = make_config(warmup_steps=2, step_time_budget_s=None if is_automatic else 0.3)
    state, decision = start(config)
    restored, timed = None, None
    for step, (loss, bad, compute_s, step_s, comm_s, wire) in enumerate(history, 1):
        signals = StepSignals(
            step, loss, bad, timed, compute_s, 0.01, comm_s, step_s, wire, 2_000_000
        )
        timed = decision.density
        before = state
        state, decision = update(config, before, signals)
        assert update(config, before, signals) == (state, decision)
        k = decision.density * CHUNK_NUMEL
        assert k == int(k)
        bounds = [kept_per_chunk(d) for d in (config.density.min, config.density.max)]
        assert k == CHUNK_NUMEL or bounds[0] <= k <= bounds[1]
        if restored is not None:
            restored, again = law.update(config, restored, signals)
            assert (restored, again) == (state, decision)
        if step == cut:
            restored = law.restore(config, json.loads(json.dumps(law.to_plain(state))))
            assert restored == state


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.301, 20.0), min_size=10, max_size=40), st.integers(1, 1024))
def test_over_budget_never_raises_the_density_while_performance_holds(step_times_s, k) -> None:
    config = make_config(density=DensityConfig(initial=0.05, min=1e-4, max=0.25))
    state = make_state(k, losses=(), step_times_s=())
    for i, step_s in enumerate(step_times_s):
        before = state.density
        signals = make_signals(
            step=10 + i,
            loss=3.0 - 0.01 * i,
            timed_density=before,
            step_time_s=step_s,
            comm_time_s=step_s - 0.2,
        )
        state, decision = update(config, state, signals)
        assert decision.density <= before
    assert state.density < k / CHUNK_NUMEL or k == 1


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.1, 0.3), min_size=1, max_size=60), st.integers(5, 1024))
def test_both_held_on_an_unchanged_network_never_moves(step_times_s, k) -> None:
    state = make_state(k, losses=(), step_times_s=())
    for i, step_s in enumerate(step_times_s):
        signals = make_signals(k, step=10 + i, loss=3.0 - 0.01 * i, step_time_s=step_s)
        state, decision = update(make_config(), state, signals)
        assert (k_of(decision), decision.cause) == (k, Cause.HOLD)


# ---- whole runs ----------------------------------------------------------------------------------


def fits(decision, rate):
    return sim.step_s(k_of(decision), rate) <= 1.02 * sim.BUDGET_S


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_density_follows_the_link_down_and_up(noise) -> None:
    fast, slow = 10 * sim.MBIT, 2.5 * sim.MBIT
    for seed in range(3):
        run = sim.Run(sim.make_config(controller="stepwise"), seed=seed, noise=noise)
        run.steps(100, fast)
        before = run.k
        run.steps(60, slow)
        # A factor of about 4.5 of the density is four or five moves; 2 steps each, 4 to notice.
        low = run.k
        assert fits(run.decisions[-1], slow)
        assert all(fits(d, slow) for d in run.decisions[100 + 4 + 2 * 6 : 160])
        assert low >= 0.7**2 * sim.best_k(slow)
        run.steps(100, fast)
        assert fits(run.decisions[-1], fast)
        assert run.k > low
        assert run.k >= 0.7**2 * min(before, sim.best_k(fast))
        assert len({d.density for d in run.decisions[-40:]}) == 1
        assert CHANGED in run.causes(160)


def test_unchanged_network_with_stalls_mostly_holds() -> None:
    for seed in range(5):
        run = sim.Run(sim.make_config(controller="stepwise"), seed=seed, noise=0.05)
        for _ in range(1000):
            run.step(10 * sim.MBIT, stall=run.rng.uniform(2, 4) if run.rng.random() < 0.02 else 1)
        # Two stalls among three times move it: at 2 % of stalls once in 800 steps.
        densities = [d.density for d in run.decisions[60:]]
        assert sum(a != b for a, b in itertools.pairwise(densities)) <= 6
