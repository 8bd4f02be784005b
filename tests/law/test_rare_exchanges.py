"""Laws where an exchange comes every few steps: budget, window and patience count steps."""

from __future__ import annotations

import pytest

from ds_gradprune.law.schedule import next_exchange, patience
from tests.helpers.simulated_law import MBIT
from tests.helpers.simulated_rounds import IslandRun, make_config

RATE = 4 * MBIT


@pytest.mark.parametrize("controller", ["predictive", "stepwise"])
@pytest.mark.parametrize("overlap", ["auto", False])
@pytest.mark.parametrize("every", [4, 16])
def test_budget_is_that_of_a_step(every: int, overlap: str | bool, controller: str) -> None:
    config = make_config(sync_every=every, overlap=overlap, controller=controller)
    run = IslandRun(config).exchanges(120, 4 * RATE / every)
    last = [step_s for _, step_s in run.steps_s[-10:]]
    assert max(last) <= 0.3
    if controller == "predictive":
        # Nothing is left but the margin of the noise, the ladder and density.max.
        assert min(last) >= 0.28 or run.k == 1024
        assert run.decisions[-1].predicted_step_s == pytest.approx(last[-1], rel=0.01)
    assert run.decisions[-1].budget_s == 0.3


@pytest.mark.parametrize("every", [4, 16, 32])
def test_rising_loss_is_answered_within_two_windows_of_steps(every: int) -> None:
    """Story: the window held 128 losses, 2,048 steps at sync_every 16, and the law was deaf."""
    window = 128
    for seed in range(5):
        run = IslandRun(make_config(sync_every=every), seed=seed)
        run.exchanges(20 + 800 // every, RATE / every, run.plateau)
        first, begin = len(run.decisions), run.step

        def rising(step: int, run: IslandRun = run, begin: int = begin) -> float:
            return run.plateau(step) + 8 * 0.05 / window * (step - begin)

        run.exchanges(max(2 * window, 16 * every) // every, RATE / every, rising)
        answers = run.raises(first)
        assert answers
        assert answers[0].density >= 1.9 * run.decisions[first - 1].density


@pytest.mark.parametrize("every", [4, 16])
def test_plateau_is_no_reason_to_prune_less(every: int) -> None:
    missed = []
    for seed in range(5):
        run = IslandRun(make_config(sync_every=every), seed=seed)
        missed += run.exchanges(500, RATE, run.plateau).raises(40)
    assert len(missed) <= 5  # of 2,500 exchanges


def test_law_forgets_a_leap_after_eight_steps_not_exchanges() -> None:
    run = IslandRun(make_config(sync_every=16))
    run.exchanges(60, RATE, run.plateau)
    run.exchange(RATE, lambda _: 40.0)
    assert run.state.arm.guard == 8  # type: ignore[union-attr]
    run.exchange(RATE, run.plateau)
    assert run.state.arm.guard == 0  # type: ignore[union-attr]


def test_patience_is_as_long_in_steps() -> None:
    assert [patience(12, every, 3) for every in (1, 2, 5, 16)] == [12, 6, 3, 3]
    assert [patience(5, every, 2) for every in (1, 2, 5, 16)] == [5, 3, 2, 2]


@pytest.mark.parametrize(("every", "most"), [(1, 13), (4, 4), (16, 4)])
def test_first_plan_waits_for_a_dozen_steps_or_three_exchanges(every: int, most: int) -> None:
    run = IslandRun(make_config(sync_every=every, step_time_budget_s=0.25))
    run.exchanges(20 + -(-20 // every) + 1, 20 * RATE / every)
    first = len(run.decisions)
    run.exchanges(most, 20 * RATE / every)
    assert any(d.density != run.decisions[first - 1].density for d in run.decisions[first:])


def test_exchange_that_passes_the_ramp_is_decided_for_its_end() -> None:
    config = make_config(sync_every=8, warmup_steps=20, ramp_steps=20)
    assert [next_exchange(config, step, 8, unpruned=False) for step in (19, 20, 28, 36, 40)] == [
        20,
        28,
        36,
        40,
        48,
    ]
    run = IslandRun(config).exchanges(24, RATE)
    assert [d.step for d in run.decisions[18:24]] == [19, 20, 28, 36, 40, 52]
