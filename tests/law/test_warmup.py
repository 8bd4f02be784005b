"""How often islands exchange in an unpruned warm-up."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

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
    [(1000, "auto", 1), (16, "auto", 4), (10, "auto", 8), (300, False, 2), (0.1, "auto", 16)],
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
    assert moves[:4] == [4, 4, 8, 16]
    assert all(b in (a // 2, a, 2 * a) for a, b in itertools.pairwise(moves))
    assert run.step >= 200 > run.step - 16
    assert "every 4 -> 8 steps" in run.decisions[2].reason
    assert "warm-up step 8 of 200: unpruned" in run.decisions[1].reason
    assert {d.cause for d in run.decisions[:-1]} == {Cause.WARMUP}
    # What is pruned comes every four steps: the way there is octave by octave, too.
    first = len(run.decisions) - 1
    run.exchanges(4, 20 * MBIT)
    assert [d.interval for d in run.decisions[first : first + 3]] == [8, 4, 4]
    assert not any(d.unpruned for d in run.decisions[first:])


def test_faster_link_shortens_the_interval() -> None:
    run = unpruned(warmup_steps=2000).exchanges(10, 10 * MBIT)
    assert run.interval == 8
    assert run.exchanges(8, 1000 * MBIT).interval == 1


def test_number_holds_in_the_warm_up_too() -> None:
    run = warmed(unpruned(sync_every=5, warmup_steps=50), 0.1 * MBIT)
    assert {d.interval for d in run.decisions} == {5}
    assert [d.step for d in run.decisions[1:4]] == [10, 15, 20]


def test_what_is_sent_unpruned_is_no_measure_of_pruned_bytes() -> None:
    network = warmed(unpruned(), 20 * MBIT).state.network
    assert not network.is_dense
    assert network.sizes == ()
    assert network.codec.dense_s == ()
