"""How often islands exchange in an unpruned warm-up."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.law import warmup
from ds_gradprune.law.decision import Cause
from tests.helpers.simulated_law import COMPUTE_S, MBIT
from tests.helpers.simulated_rounds import IslandRun, make_config


def unpruned(**fields: Any) -> IslandRun:
    base: dict[str, Any] = {
        "sync_every": "auto",
        "overlap": "auto",
        "warmup": "unpruned",
        "warmup_steps": 200,
        "step_time_budget_s": None,
    }
    return IslandRun(make_config(**(base | fields)), noise=0.02)


def warmed(run: IslandRun, rate: float) -> IslandRun:
    """Up to the first exchange that is no unpruned one."""
    while run.decisions[-1].unpruned:
        run.exchange(rate)
    return run


@pytest.mark.parametrize(
    ("rate", "overlap", "interval"),
    [(1000, "auto", 1), (8, "auto", 4), (2.5, "auto", 8), (150, False, 2), (0.1, "auto", 8)],
)
def test_interval_is_the_shortest_that_hardly_costs_time(
    rate: float, overlap: Any, interval: int
) -> None:
    run = warmed(unpruned(overlap=overlap), rate * MBIT)
    found = [d.interval for d in run.decisions if d.unpruned]
    assert found[0] == 4
    assert found[-1] == interval
    steps = [step_s for _, step_s in run.steps_s[: len(found)]][-1]
    assert steps < 1.15 * COMPUTE_S or interval == warmup.MOST


def test_interval_moves_by_octaves_and_warm_up_ends_with_an_exchange_of_its_own() -> None:
    run = warmed(unpruned(), 0.1 * MBIT)
    moves = [d.interval for d in run.decisions]
    assert moves[:4] == [4, 4, 8, 8]
    assert all(b in (a // 2, a, 2 * a) for a, b in itertools.pairwise(moves))
    assert run.step >= 200 > run.step - 8
    assert "every 4 -> 8 steps" in run.decisions[2].reason
    assert "warm-up step 8 of 200: unpruned" in run.decisions[1].reason
    assert {d.cause for d in run.decisions[:-1]} == {Cause.WARMUP}
    # What is pruned comes every four steps: the way there is octave by octave, too.
    first = len(run.decisions) - 1
    run.exchanges(4, 20 * MBIT)
    assert [d.interval for d in run.decisions[first : first + 3]] == [4, 4, 4]
    assert not any(d.unpruned for d in run.decisions[first:])


def test_faster_link_shortens_the_interval() -> None:
    run = unpruned(warmup_steps=2000).exchanges(10, 2.5 * MBIT)
    assert run.interval == 8
    assert run.exchanges(8, 1000 * MBIT).interval == 1


def test_number_holds_in_the_warm_up_too() -> None:
    run = warmed(unpruned(sync_every=5, warmup_steps=50), 0.1 * MBIT)
    assert {d.interval for d in run.decisions} == {5}
    assert [d.step for d in run.decisions[1:4]] == [10, 15, 20]


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("ramp_steps", [0, 20])
def test_number_holds_after_a_warm_up_that_was_decided(every: int, ramp_steps: int) -> None:
    fields = {"sync_every": every, "warmup": "auto", "warmup_steps": 61, "overlap": False}
    run = warmed(unpruned(ramp_steps=ramp_steps, **fields).exchanges(2, MBIT), MBIT)
    found = [d.interval for d in run.decisions if d.unpruned]
    assert found[-1] == warmup.MOST
    assert all(1 <= way <= 10 for way in found)
    assert (run.interval, run.decisions[-1].step) == (every, run.step + every)
    run.exchanges(30, MBIT)
    assert {d.interval for d in run.decisions[-30:]} == {every}


def test_what_is_sent_unpruned_is_no_measure_of_pruned_bytes() -> None:
    network = warmed(unpruned(), 20 * MBIT).state.network
    assert not network.is_dense
    assert network.sizes == ()
    assert network.codec.dense_s == ()


# ---- "auto" --------------------------------------------------------------------------------------


def auto(**fields: Any) -> IslandRun:
    return unpruned(**({"warmup": "auto"} | fields))


@pytest.mark.parametrize(
    ("rate", "dense_steps"),
    # A dense exchange of 4 MB takes 3.2, 0.64, 0.32, 0.21 and 0.16 s beside 0.2 s of computation.
    [(10, 2), (50, 3), (100, 5), (150, 6), (200, None)],
)
def test_warm_up_goes_on_unpruned_where_dense_exchanges_take_longer_than_the_computation(
    rate: float, dense_steps: int | None
) -> None:
    run = auto().exchanges(20, rate * MBIT)
    dense = [d for d in run.decisions[:20] if not d.unpruned]
    assert len(dense) == (dense_steps or 20)
    assert {d.cause for d in run.decisions} == {Cause.WARMUP}
    told = [d for d in run.decisions if " of computation" in d.reason]
    assert [d is run.decisions[dense_steps or 6] for d in told] == [True]
    assert run.state.warmup.form == ("unpruned" if dense_steps else "dense")
    assert "dense" in told[0].reason


def test_first_interval_is_estimated_from_dense_exchanges() -> None:
    run = auto().exchanges(2, 2.5 * MBIT)
    reason = "warm-up step 6 of 200: unpruned, every 4 -> 8 steps, as a dense exchange takes 13"
    assert run.decisions[-1].reason.startswith(reason)
    assert (run.interval, run.decisions[-1].step) == (8, 10)


def test_form_is_settled_once() -> None:
    slow = auto().exchanges(10, 10 * MBIT)
    assert slow.exchanges(30, 1000 * MBIT).decisions[-1].unpruned
    fast = auto().exchanges(10, 1000 * MBIT)
    assert not fast.exchanges(30, MBIT).decisions[-1].unpruned


def test_form_stays_dense_where_nothing_can_be_saved() -> None:
    assert not any(d.unpruned for d in auto(warmup_steps=9).exchanges(9, 50 * MBIT).decisions)
    assert any(d.unpruned for d in auto(warmup_steps=19).exchanges(9, 50 * MBIT).decisions)


@pytest.mark.parametrize("fields", [{"prune": "gradient"}, {"controller": "stepwise"}])
def test_where_nothing_decides_auto_is_dense(fields: Any) -> None:
    config = GradientPruningConfig(**fields)
    assert (config.warmup, config.warmup_form) == ("auto", "dense")
    assert GradientPruningConfig().warmup_form == "auto"


@pytest.mark.parametrize(
    ("rate", "overlap", "cut"),
    [(20, "auto", 0.125), (20, False, 0.05), (5, "auto", 0.03125), (1000, False, None)],
)
def test_ramp_after_an_unpruned_warm_up_is_what_the_link_bears(
    rate: float, overlap: Any, cut: float | None
) -> None:
    """Of a race of 300 steps at 20 Mbit/s with 10M parameters it took 23 of 124 s uncut."""
    fields = {"warmup_steps": 16, "ramp_steps": 20, "sync_every": 1, "overlap": overlap}
    run = warmed(unpruned(**fields), rate * MBIT).exchanges(22, rate * MBIT)
    ramp = [d for d in run.decisions if d.cause is Cause.RAMP]
    assert len(ramp) == 20
    if cut is None:
        assert ramp[0].density == 0.25
        assert not any("cut to" in d.reason for d in ramp)
        return
    assert ramp[0].density == 0.25 or "cut to " in ramp[0].reason
    assert max(d.density for d in ramp[3:]) == pytest.approx(cut, abs=1 / CHUNK_NUMEL)
    assert "cut to " in ramp[4].reason
    after = run.decisions[run.decisions.index(ramp[-1]) + 1]
    assert after.density <= 1.3 * ramp[-1].density  # the law goes on from there
