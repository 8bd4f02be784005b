"""How a run begins whose link was tried: unpruned from step 1 where dense exchanges are dear."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ds_gradprune import law
from ds_gradprune.law.decision import Cause
from ds_gradprune.law.signals import RankSignals
from tests.helpers.simulated_law import COMPUTE_S, MBIT
from tests.helpers.simulated_rounds import IslandRun, make_config


def rank(dense_s: float, compute_s: float | None = COMPUTE_S) -> RankSignals:
    return RankSignals(None, False, compute_s, 0.0, dense_s, 0, 0)


def tried(*ranks: RankSignals, **fields: Any) -> IslandRun:
    base = {"warmup": "auto", "warmup_steps": 200, "overlap": "auto", "sync_every": 1}
    run = IslandRun(make_config(**(base | fields)))
    assert law.asks_for_trial(run.config, run.state)
    run.state, run.decisions[0] = law.begin(run.config, run.state, run.decisions[0], ranks)
    return run


@pytest.mark.parametrize(
    ("ranks", "unpruned"),
    [
        ((rank(3.0), rank(3.0)), True),
        ((rank(2.4 * COMPUTE_S), rank(2.4 * COMPUTE_S)), False),
        ((rank(0.01), rank(2.6 * COMPUTE_S)), True),  # the slowest link of all
        ((rank(3.0), rank(3.0, 2.0)), False),  # the slowest computation of all
        ((rank(3.0), rank(3.0, None)), False),
        ((rank(3.0, 0.0), rank(3.0, 0.0)), False),
        ((rank(float("nan")), rank(3.0)), False),
        ((rank(0.0), rank(0.0)), False),
    ],
)
def test_slowest_rank_says_whether_anything_is_sent_dense(
    ranks: tuple[RankSignals, ...], unpruned: bool
) -> None:
    first = tried(*ranks).decisions[0]
    assert (first.unpruned, first.density, first.step) == (unpruned, 1.0, first.interval)
    assert first.interval == 1 or unpruned
    assert first.cause is Cause.WARMUP
    assert ("a dense exchange would take" in first.reason) is unpruned


def test_short_warm_up_stays_dense() -> None:
    """A warm-up of two steps of 2 s is not worth another form."""
    assert not tried(rank(2.0), rank(2.0), warmup_steps=2).decisions[0].unpruned


@pytest.mark.parametrize("sync_every", [1, 3, "auto"])
def test_first_round_is_what_the_link_is_thought_to_bear(sync_every: Any) -> None:
    run = tried(rank(12.8), rank(12.8), sync_every=sync_every).exchanges(7, 2.5 * MBIT)
    assert [d.interval for d in run.decisions] == [8] * 8
    assert [d.step for d in run.decisions[:5]] == [8, 16, 24, 32, 40]
    assert {d.unpruned for d in run.decisions} == {True}
    assert "warm-up step 8 of 200: unpruned, every 1 -> 8 steps, as " in run.decisions[0].reason
    short = tried(rank(12.8), rank(12.8), sync_every=sync_every, warmup_steps=6).decisions[0]
    assert (short.step, short.interval) == (6, 8)


def test_link_that_bears_more_has_shorter_rounds() -> None:
    firsts = [tried(rank(s), rank(s)).decisions[0].interval for s in (3.4, 3.68, 4.2, 12.8)]
    assert firsts == [1, 2, 4, 8]


def test_what_exchanges_take_corrects_the_trial() -> None:
    """The trial met a moment at which the link was busy."""
    run = tried(rank(12.8), rank(12.8)).exchanges(8, 1000 * MBIT)
    assert [d.interval for d in run.decisions][-1] == 1
    assert all(
        b in (a // 2, a, 2 * a) for a, b in itertools.pairwise(d.interval for d in run.decisions)
    )


def test_trial_is_asked_for_once_and_where_it_decides() -> None:
    run = tried(rank(3.0), rank(3.0))
    assert not law.asks_for_trial(run.config, run.state)
    run = tried(rank(0.1), rank(0.1)).exchanges(1, 1000 * MBIT)
    run.exchanges(1, 1000 * MBIT)
    assert not law.asks_for_trial(run.config, run.state)
    others: list[dict[str, Any]] = [
        {"warmup": "dense"},
        {"warmup": "unpruned"},
        {"warmup_steps": 0},
        {"controller": "stepwise"},
    ]
    for fields in others:
        config = make_config(**({"warmup": "auto", "warmup_steps": 200} | fields))
        state, decision = law.start(config)
        assert not law.asks_for_trial(config, state)
        if fields.get("controller"):
            assert law.begin(config, state, decision, [rank(3.0)]) == (state, decision)


def test_state_of_a_tried_run_is_read_again() -> None:
    run = tried(rank(3.0), rank(3.0))
    assert law.restore(run.config, law.to_plain(run.state)) == run.state
