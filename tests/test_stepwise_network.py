"""What the law "stepwise" does about a change of the network, case by case."""

import dataclasses

import pytest

from ds_gradprune.config import DensityConfig
from ds_gradprune.controller.stepwise import update
from ds_gradprune.link import LinkState, observe
from ds_gradprune.records import CHUNK_NUMEL, Cause
from tests.helpers.control import (
    DOWN,
    FASTER,
    RISING,
    SLOWER,
    UP,
    K,
    make_config,
    make_signals,
    make_state,
)


def test_faster_network_prunes_less_while_it_fits() -> None:
    # 4 ms for 100 kB: a step up costs 4 ms more at most, and 100 ms are free.
    signals = make_signals(comm_time_s=0.004, step_time_s=0.2)
    after, decision = update(make_config(), make_state(link=FASTER), signals)
    assert decision.cause is Cause.NETWORK_CHANGED
    assert decision.density == UP / CHUNK_NUMEL
    assert decision.network_changed
    assert after.adjusting
    assert "the network became faster, now 25 MB/s" in decision.reason


def test_adjusting_goes_on_one_step_at_a_time_without_a_new_alarm() -> None:
    state = make_state(adjusting=True, step_times_s=())
    _, decision = update(make_config(), state, make_signals())
    assert decision.cause is Cause.NETWORK_CHANGED
    assert decision.density == UP / CHUNK_NUMEL
    assert not decision.network_changed


def test_adjusting_ends_when_the_next_step_would_not_fit() -> None:
    # 200 ms for 100 kB: a step up costs 86 ms more, and 50 ms are free.
    signals = make_signals(comm_time_s=0.2, step_time_s=0.25)
    state = make_state(adjusting=True, step_times_s=(0.25,))
    state, decision = update(make_config(), state, signals)
    assert decision.cause is Cause.HOLD
    assert state.adjusting  # two samples: one of them may be an outlier
    state, decision = update(make_config(), state, signals)
    assert decision.cause is Cause.HOLD
    assert not state.adjusting
    assert decision.reason.startswith("P ")
    assert "within 0.300 s, but 0.336 s at 0.0715: hold at 0.0500" in decision.reason


def test_adjusting_ends_at_max() -> None:
    state, decision = update(
        make_config(), make_state(1024, adjusting=True), make_signals(1024, comm_time_s=0.001)
    )
    assert decision.cause is Cause.HOLD
    assert not state.adjusting


def test_adjusting_ends_when_a_step_turns_out_over_budget() -> None:
    state = make_state(adjusting=True, step_times_s=(0.9, 0.9))
    after, decision = update(make_config(), state, make_signals(step_time_s=0.9))
    assert decision.cause is Cause.OVER_BUDGET
    assert not after.adjusting


def test_adjusting_waits_for_times_of_this_density() -> None:
    state = make_state(adjusting=True, step_times_s=())
    after, decision = update(make_config(), state, make_signals(2 * K))
    assert decision.cause is Cause.HOLD
    assert after.adjusting
    # Restored from a checkpoint: samples are there, but the newest signals carry no times.
    link, _ = observe(LinkState(), 0.04, 100_000)
    state = make_state(adjusting=True, link=link)
    signals = make_signals(timed_density=None, comm_time_s=0.0, wire_bytes=0, step_time_s=None)
    after, decision = update(make_config(), state, signals)
    assert decision.cause is Cause.HOLD
    assert after.adjusting


def test_adjusting_gives_way_to_missed_performance_and_survives_it() -> None:
    state = make_state(adjusting=True, losses=RISING)
    after, decision = update(make_config(), state, make_signals())
    assert decision.cause is Cause.PERFORMANCE_MISSED
    assert after.adjusting


def test_step_up_to_dense_is_judged_by_the_dense_bytes() -> None:
    config = make_config(density=DensityConfig(initial=0.05, min=0.001, max=1.0))
    k = 3000  # the next step up is dense
    state = make_state(k, adjusting=True, step_times_s=(0.2, 0.2))
    fits = make_signals(k, comm_time_s=0.1, wire_bytes=100_000, dense_bytes=150_000)
    _, decision = update(config, state, fits)  # 50 ms more
    assert decision.density == 1.0
    fits_not = make_signals(k, comm_time_s=0.1, wire_bytes=100_000, dense_bytes=250_000)
    _, decision = update(config, state, fits_not)  # 150 ms more
    assert decision.density == k / CHUNK_NUMEL


def test_slower_network_prunes_on_a_single_sample() -> None:
    state = make_state(link=SLOWER, step_times_s=())
    signals = make_signals(comm_time_s=0.4, step_time_s=0.56)
    after, decision = update(make_config(), state, signals)
    assert decision.cause is Cause.OVER_BUDGET
    assert decision.density == DOWN / CHUNK_NUMEL
    assert decision.network_changed
    assert after.pressed
    assert decision.reason == (
        "step 0.560 s over its budget of 0.300 s: density 0.0500 -> 0.0352; "
        "the network became slower, now 0.25 MB/s"
    )


def test_samples_from_before_a_change_do_not_count() -> None:
    state = make_state(link=SLOWER, step_times_s=(0.2, 0.2))
    signals = make_signals(comm_time_s=0.4, step_time_s=0.56)
    _, decision = update(make_config(), state, signals)
    assert decision.cause is Cause.OVER_BUDGET


def test_single_samples_suffice_until_the_budget_is_met() -> None:
    state = make_state(pressed=True, step_times_s=())
    after, decision = update(make_config(), state, make_signals(step_time_s=0.5))
    assert decision.cause is Cause.OVER_BUDGET
    assert after.pressed
    after, decision = update(make_config(), state, make_signals(step_time_s=0.25))
    assert decision.cause is Cause.HOLD
    assert not after.pressed
    after = dataclasses.replace(after, step_times_s=())
    after, decision = update(make_config(), after, make_signals(step_time_s=0.5))
    assert decision.cause is Cause.HOLD


def test_slower_network_ends_adjusting_and_faster_ends_pressed() -> None:
    after, _ = update(
        make_config(),
        make_state(link=SLOWER, adjusting=True),
        make_signals(comm_time_s=0.4, step_time_s=0.2),
    )
    assert not after.adjusting
    after, _ = update(
        make_config(),
        make_state(link=FASTER, pressed=True),
        make_signals(comm_time_s=0.004, step_time_s=0.9),
    )
    assert not after.pressed
    assert after.adjusting


def test_slower_network_within_budget_holds_and_is_noted() -> None:
    signals = make_signals(comm_time_s=0.4, step_time_s=0.25)
    _, decision = update(make_config(), make_state(link=SLOWER), signals)
    assert decision.cause is Cause.HOLD
    assert decision.network_changed
    assert "the network became slower" in decision.reason


@pytest.mark.parametrize("known", [SLOWER, FASTER])
def test_change_of_the_network_is_noted_whatever_the_rule(known) -> None:
    last_s = 0.4 if known is SLOWER else 0.004
    which = "slower" if known is SLOWER else "faster"
    config = make_config(warmup_steps=100)
    for case in (
        (config, make_state(link=known), make_signals(comm_time_s=last_s)),
        (make_config(), make_state(link=known, losses=RISING), make_signals(comm_time_s=last_s)),
        (make_config(), make_state(link=known), make_signals(comm_time_s=last_s, nonfinite=True)),
    ):
        _, decision = update(*case)
        assert decision.network_changed
        assert f"the network became {which}" in decision.reason


def test_change_during_warmup_starts_no_adjusting() -> None:
    after, _ = update(
        make_config(warmup_steps=100), make_state(link=FASTER), make_signals(comm_time_s=0.004)
    )
    assert not after.adjusting


def test_reasons_carry_the_numbers() -> None:
    _, decision = update(
        make_config(), make_state(losses=(3.0, 2.6, 2.9, 2.4, 2.8)), make_signals()
    )
    assert decision.performance is not None
    assert decision.reason == (
        f"P {decision.performance:.2f} >= target 0, step 0.200 s within 0.300 s: hold at 0.0500"
    )
    _, decision = update(make_config(), make_state(losses=RISING), make_signals())
    assert decision.reason == (
        f"P {decision.performance:.2f} misses its target 0: density 0.0500 -> 0.0715"
    )
    _, decision = update(make_config(), make_state(losses=()), make_signals())
    assert decision.reason.startswith("P not known yet (1 of 5), step 0.200 s within 0.300 s")
