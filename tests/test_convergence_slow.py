"""The laboratory's slow average: what it adds, what it foretells, and dense with one."""

from __future__ import annotations

import pytest
import torch

from benchmarks.convergence_lab.adamw import learning_rate
from benchmarks.convergence_lab.base import DenseSimulation, DenseSlowSimulation
from benchmarks.convergence_lab.drift import Drift
from benchmarks.convergence_lab.grid import DenseSlow, Update
from benchmarks.convergence_lab.update import UpdateSimulation
from tests.test_convergence import SETTING, TRAIN, tokens, train


def test_what_moves_one_way_is_foretold() -> None:
    drift, move = Drift(2, 2.0, 0.5, predicted=True), torch.tensor([[0.3, -0.1]])
    assert torch.equal(drift.add_to(move), move)  # nothing has been foretold by nothing
    for _ in range(500):
        moved = drift.add_to(move)
    assert drift.persistence == pytest.approx(1.0, abs=0.01)
    torch.testing.assert_close(moved, 3 * move, rtol=0.01, atol=0)


def test_what_swings_back_is_left_alone() -> None:
    drift = Drift(2, 2.0, 0.5, predicted=True)
    for step in range(50):
        move = torch.full((1, 2), 0.3 * (-1) ** step)
        assert torch.equal(drift.add_to(move), move)
    assert drift.persistence < 0


def test_what_is_not_sent_again_is_foretold_of_the_whole() -> None:
    sparse, whole = (Drift(100, 1.0, 0.99, predicted=True) for _ in range(2))
    own = torch.full((1, 100), 0.01)
    for step in range(1000):
        move = torch.zeros(1, 100)
        move[0, step % 100] = 1.0  # everything goes on at one pace, but is sent in turn
        sparse.add_to(move)
        whole.add_to(move, own)
    assert sparse.persistence == pytest.approx(0.54, abs=0.02)
    assert whole.persistence > 0.9


def test_own_moves_are_the_shared_ones_when_all_is_sent() -> None:
    fields = {"density": 1.0, "value_bits": 32, "scale_at": "shared", "warmup": "gradient"}
    found = []
    for by in ("own", "predicted"):
        method = Update.model_validate(
            {"kind": "update", "name": "u", "slow": 1.0, "slow_by": by, **fields}
        )
        simulation = UpdateSimulation(SETTING, method)
        train(simulation)
        found.append(simulation.notes()["persistence"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] != 0.0


def test_noise_is_foretold_as_little_as_it_can_be() -> None:
    generator = torch.Generator().manual_seed(0)
    drift = Drift(10_000, 1.0, 0.99, predicted=True)
    for _ in range(300):
        drift.add_to(torch.randn(1, 10_000, generator=generator))
    # Independent of the average: its standard error is some 0.01.
    assert abs(drift.persistence) < 0.05


def test_dense_can_have_a_slow_momentum_after_warmup() -> None:
    method = DenseSlow(kind="dense_slow", name="d", slow=2.0, slow_decay=0.5)
    slow, dense = DenseSlowSimulation(SETTING, method), DenseSimulation(SETTING)
    torch.testing.assert_close(train(slow, steps=2), train(dense, steps=2), rtol=0, atol=0)
    before = dense.shared.clone()
    for simulation in (slow, dense):
        simulation.step(2, tokens(2), learning_rate(TRAIN, 2, 8))
    moved = dense.shared - before  # the average is half of the one move, and added twice
    torch.testing.assert_close(slow.shared, before + 2 * moved, rtol=0, atol=1e-6)
    assert slow.notes() == {"persistence": 0.0}


def test_what_comes_sooner_is_owed_no_more() -> None:
    fields = {
        "kind": "update",
        "name": "u",
        "slow": 1.0,
        "scale_at": "shared",
        "warmup": "gradient",
    }
    besides, sooner = (
        UpdateSimulation(SETTING, Update.model_validate({**fields, "slow_owed": owed}))
        for owed in (False, True)
    )
    for simulation in (besides, sooner):
        train(simulation, steps=3)  # two of warm-up, one alone: both have sent the same
    assert not torch.equal(sooner._owed, besides._owed)
    torch.testing.assert_close(sooner.shared, besides.shared, rtol=0, atol=1e-6)
    added = besides.flushed() - sooner.flushed()
    assert sooner._drift is not None
    torch.testing.assert_close(added, sooner._drift._average[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("power", "factor"), [(1.0, 10.0), (0.5, 10**0.5)])
def test_a_score_weighs_by_the_second_moment(power: float, factor: float) -> None:
    method = Update(kind="update", name="u", score="second_moment", score_power=power)
    simulation = UpdateSimulation(SETTING, method)
    simulation._adam.v[:, 0], simulation._adam.v[:, 1:] = 9.0, 0.09
    score = simulation._score_now(0)
    assert score is not None
    assert float(score[0] / score[1]) == pytest.approx(factor)
    simulation._adam.v.fill_(1.0)
    assert simulation._score_now(49) is score  # renewed every 50 steps
    assert float(simulation._score_now(50).max()) == 1.0  # type: ignore[union-attr]


def test_a_score_keeps_elements_without_gradient() -> None:
    method = Update(kind="update", name="u", score="second_moment")
    simulation = UpdateSimulation(SETTING, method)
    simulation._adam.v[:, 1:] = 1.0
    score = simulation._score_now(0)
    assert score is not None
    assert 0.0 < float(score.min()) < 0.1
