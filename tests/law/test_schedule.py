"""What goes by the step number: warm-up, ramp, targets."""

import math

import pytest

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.config import DensityConfig, TargetPoint
from ds_gradprune.law.decision import Cause
from ds_gradprune.law.schedule import first_decision, scheduled, target_at
from tests.helpers.simulated_law import make_config

DENSITY = DensityConfig(initial=0.05, min=0.001, max=0.25)


def test_warmup_is_dense_for_exactly_its_steps() -> None:
    config = make_config(warmup_steps=7, ramp_steps=5, density=DENSITY)
    choices = [scheduled(config, step) for step in range(1, 14)]
    assert all(choice.k == CHUNK_NUMEL for choice in choices[:7])
    assert {choice.cause for choice in choices[:7]} == {Cause.WARMUP}
    assert choices[6].text == "warm-up step 7 of 7: dense"
    assert {choice.cause for choice in choices[7:12]} == {Cause.RAMP}
    assert choices[12] is None


def test_ramp_falls_geometrically_from_max_to_initial() -> None:
    config = make_config(warmup_steps=7, ramp_steps=5, density=DENSITY)
    ks = [scheduled(config, step).k for step in range(8, 13)]
    # 0.25 to 0.05 in 4 equal factors, rounded up to whole elements of 4096.
    assert ks == [math.ceil(1024 * 0.2 ** (i / 4)) for i in range(5)]
    assert scheduled(config, 12).text == "ramp step 5 of 5: density 5.00 %"


def test_ramp_through_whole_numbers_of_elements_is_exact() -> None:
    # Ninths of a factor of 512: every step halves. A power that comes out a hair above is no more.
    density = DensityConfig(initial=1 / 1024, min=1 / 1024, max=0.5)
    config = make_config(warmup_steps=0, ramp_steps=10, density=density)
    assert [scheduled(config, step).k for step in range(1, 11)] == [2**n for n in range(11, 1, -1)]


@pytest.mark.parametrize("ramp_steps", [0, 1])
def test_short_ramp_is_one_step_at_the_initial_density(ramp_steps) -> None:
    config = make_config(warmup_steps=3, ramp_steps=ramp_steps, density=DENSITY)
    assert scheduled(config, 3).cause is Cause.WARMUP
    assert scheduled(config, 4).k == 205
    assert scheduled(config, 5) is None


def test_first_decision_is_the_schedules() -> None:
    decision = first_decision(make_config(warmup_steps=0, ramp_steps=0, density=DENSITY))
    assert (decision.step, decision.cause) == (1, Cause.RAMP)
    assert decision.density == 205 / CHUNK_NUMEL
    assert decision.reason == "start of pruning: density 5.00 %"
    assert decision.performance is None
    assert decision.budget_s == 0.3
    assert first_decision(make_config(warmup_steps=1)).density == 1.0


def test_target_is_that_of_the_last_point_that_has_begun() -> None:
    points = [TargetPoint(step=10, target=0.5), TargetPoint(step=20, target=-1.0)]
    config = make_config(performance_target=0.1, performance_target_schedule=points)
    found = [target_at(config, step) for step in (1, 9, 10, 19, 20, 999)]
    assert found == [0.1, 0.1, 0.5, 0.5, -1.0, -1.0]
    assert target_at(make_config(performance_target=0.2), 5) == 0.2
