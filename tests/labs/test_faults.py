"""The fault laboratory on loopback: it plays what it draws, and it finds what it should find."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.train.islands import Islands
from ds_gradprune.train.residual import Residuals
from labs.faults import bed_lost, bed_schedule, loopback
from labs.faults.command import summarize
from labs.faults.schedules import KINDS, Event, Schedule, draw

pytestmark = pytest.mark.timeout(120)


def schedule(*events: Event, steps: int = 6, **block: Any) -> Schedule:
    pinned = {"initial": 0.05, "min": 0.05, "max": 0.05}
    given = {"prune": "update", "warmup": "unpruned", "warmup_steps": 0, "ramp_steps": 0}
    given |= {"window_size": 4, "density": pinned, "verify_every_steps": 1} | block
    config = GradientPruningConfig.model_validate(given)
    return Schedule(7, config, 2, steps, 2, hides=False, resumes=True, events=events)


def test_a_seed_gives_the_same_schedules_again() -> None:
    drawn = [draw(3, number) for number in range(60)]
    assert drawn == [draw(3, number) for number in range(60)]
    assert drawn != [draw(4, number) for number in range(60)]
    assert {event.kind for one in drawn for event in one.events} == set(KINDS)
    beds = [bed_schedule.draw(3, number) for number in range(30)]
    assert {one.deed for one in beds} == set(bed_schedule.DEEDS)
    assert {one.supervised for one in beds} == {True, False}


@pytest.mark.parametrize(
    ("deed", "host", "left"),
    [
        ("kill", 0, {1, 2}),
        ("down", 1, {0, 2}),
        ("down", 0, {0}),  # which keeps the store
        ("one way", 1, {0, 1}),
        ("one way", 2, {0, 1}),
        ("outage", 0, {0, 1, 2}),
    ],
)
def test_who_can_still_be_reached_must_go_on(deed: str, host: int, left: set[int]) -> None:
    drawn = [bed_lost.draw(5, number) for number in range(30)]
    assert {one.deed for one in drawn} == set(bed_lost.DEEDS)
    assert bed_lost.left(dataclasses.replace(drawn[0], deed=deed, host=host)) == left


def test_a_host_of_several_ranks_is_one_island() -> None:
    one, two = (bed_lost.draw(5, 2, ranks) for ranks in (1, 2))
    assert dataclasses.replace(two, ranks=1) == one
    assert (one.world_size, one.victim, two.world_size) == (3, one.host, 6)
    assert two.victim == 2 * two.host + 1  # whose other rank must end with it
    assert bed_lost.ranks_on({0, 2}, two) == {0, 1, 4, 5}
    assert bed_lost.ranks_on({0, 2}, one) == {0, 2}


@pytest.mark.parametrize("prune", ["update", "gradient"])
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"stop", "delay", "foreign"}))
def test_every_kind_of_fault_ends_well(kind: str, prune: str, tmp_path: Path) -> None:
    """A frozen and a late rank take real time: `benchmarks/faults.py` has them."""
    life = 1 if kind == "flip" else 0
    events = [Event(kind, life, 1, 4, 1)]
    if kind == "flip":
        events.append(Event("kill", 0, 0, 5, 0))
    verdict = loopback.play(schedule(*events, prune=prune, warmup="dense"), tmp_path)
    assert verdict.end == "finished", verdict.notes
    assert not verdict.diverged, verdict.notes
    assert not verdict.lost_gradient, verdict.notes


def test_a_bit_that_flips_in_one_ranks_weights_is_found(tmp_path: Path) -> None:
    verdict = loopback.play(schedule(Event("foreign", 0, 1, 2, 0)), tmp_path)
    assert "RankMismatchError" in verdict.notes[0]
    assert verdict.lives == 2


def test_a_rank_that_counts_less_is_compared_after_the_steps_that_it_made(tmp_path: Path) -> None:
    """Its hash of the next step stood where that of its own count belonged: a false alarm."""
    # Both ranks wait for each other, and the threads decide whose time-out is told.
    for attempt in range(8):
        verdict = loopback.play(draw(13, 77), tmp_path / str(attempt))
        assert verdict.end == "finished", verdict.notes
        assert not verdict.diverged
        if "had no answer from rank 1" in verdict.notes[0]:
            break
    assert "had no answer from rank 1" in verdict.notes[0]


def test_a_product_that_forgets_its_residual_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The laboratory itself can fail."""
    real = Residuals.stage
    monkeypatch.setattr(Residuals, "stage", lambda self, k, n, _: real(self, k, n, None))
    verdict = loopback.play(schedule(prune="gradient", warmup="dense"), tmp_path)
    assert verdict.lost_gradient


def test_islands_that_apply_different_factors_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Islands, "factor_at", lambda self, *_: 0.5 + 0.01 * self.channel.rank)
    plain = schedule(verify_every_steps=None)
    assert loopback.play(plain, tmp_path / "a").diverged
    found = dataclasses.replace(plain, resumes=False, config=schedule().config)
    assert "RankMismatchError" in loopback.play(found, tmp_path / "b").notes[0]


def test_the_document_counts_ends_and_takes_quantiles() -> None:
    restarted = {"end": "finished", "deed": "kill", "supervised": True}
    rows = [restarted | {"recover_s": float(n)} for n in range(21)]
    rows += [{"end": "typed_error", "typed_s": 3.0, "diverged": True}, {"end": "hung"}]
    found = summarize(rows)
    assert (found["schedules"], found["finished"], found["hung"]) == (23, 21, 1)
    assert (found["diverged"], found["lost_gradient"]) == (1, 0)
    assert (found["recover_s_p95"], found["typed_s_p95"]) == (19.0, 3.0)
