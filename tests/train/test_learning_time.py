"""Outer momentum in learning-rate time."""

from __future__ import annotations

import pytest
import torch

from ds_gradprune.errors import CheckpointError
from ds_gradprune.train.learning_time import LearningTime
from ds_gradprune.train.outer import (
    Scale,
    SlowMomentum,
    TimedMomentum,
    make_rule,
    slow_decay,
)

NUMEL = 64


def drift_after(rule: SlowMomentum, move: float) -> float:
    rule.begin(0, torch.zeros(NUMEL), 0, NUMEL)
    rule.note_dense(torch.full((NUMEL,), move))
    drift = rule.drift()
    assert drift is not None
    return float(drift[0])


def test_equal_rounds_at_a_constant_rate_are_those_of_a_fixed_interval() -> None:
    timed, plain = TimedMomentum(1.0), SlowMomentum(1.0, slow_decay(8))
    clock = LearningTime(timed)
    for _ in range(20):
        for _ in range(8):
            clock.end_step([0.01])
        assert clock.end_round() == 8.0
        assert drift_after(timed, 0.5) == pytest.approx(drift_after(plain, 0.5), rel=1e-6)


def test_a_lasting_move_goes_as_far_whatever_the_rounds() -> None:
    """The weights move by 0.01 a step; the drift of a round of any length follows within memory."""
    rule = TimedMomentum(1.0)
    for time in [4.0] * 300 + [16.0, 8.0, 4.0, 2.0, 1.0, 32.0]:
        rule.elapse(time)
        assert time == 4.0 or drift_after(rule, 0.01 * time) == pytest.approx(0.01 * time, rel=0.01)
        if time == 4.0:
            drift_after(rule, 0.04)


def test_a_falling_rate_counts_less_and_the_highest_rate_is_the_unit() -> None:
    clock = LearningTime(TimedMomentum(1.0))
    clock.end_step([0.02, 0.001])
    clock.end_step([0.01])
    assert clock.end_round() == 1.5
    clock.end_step([0.04])
    assert clock.end_round() == 1.0
    clock.end_step([0.0])
    assert clock.end_round() == 0.0


def test_the_last_bit_of_a_schedule_makes_no_difference() -> None:
    times = []
    for factor in (1.0, 1.0 + 2.0**-52):
        clock = LearningTime(TimedMomentum(1.0))
        clock.end_step([0.3])
        clock.end_step([0.1 * factor])
        times.append(clock.end_round())
    assert times[0] == times[1]


def test_state_goes_on_alike_also_from_a_fixed_interval() -> None:
    rule, clock = TimedMomentum(0.5), None
    rule.elapse(4.0)
    drift_after(rule, 1.0)
    other = TimedMomentum(0.5)
    other.take(other.read(rule.state_dict()))
    for each in (rule, other):
        each.elapse(8.0)
    assert drift_after(rule, 2.0) == drift_after(other, 2.0)
    fixed = SlowMomentum(0.5, 0.9)
    drift_after(fixed, 1.0)
    other.take(other.read(fixed.state_dict()))
    clock = LearningTime(other)
    clock.load_state_dict(None)
    with pytest.raises(CheckpointError, match="must have a time above 0, got nan"):
        other.read({"time": float("nan"), "drifts": []})


def test_rule_follows_the_configuration() -> None:
    assert isinstance(make_rule(1.0, "auto"), TimedMomentum)
    assert isinstance(make_rule(0.0, "auto"), Scale)
    assert type(make_rule(1.0, 4)) is SlowMomentum
