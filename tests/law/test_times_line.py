"""The line that says what a step is made of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ds_gradprune.law.times_line import FIRST, TimesLine


def report(step: int, steps: int = 1, wall_s: float | None = 1.0) -> Any:
    return SimpleNamespace(
        step=step,
        steps=steps,
        step_time_s=wall_s,
        codec_time_s=0.125,
        comm_time_s=0.25,
        hidden_time_s=0.5,
    )


def test_lines_come_after_ten_exchanges_and_whenever_there_are_twice_as_many() -> None:
    line = TimesLine()
    said = [step for step in range(1, 101) if line.see(report(step)) is not None]
    assert said == [FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST]


def test_a_line_is_about_the_steps_since_the_one_before() -> None:
    line = TimesLine()
    for step in range(1, 20):
        line.see(report(step))
    assert line.see(report(20, wall_s=11.0)) == (
        "steps 11 to 20: 2 s a step: computation 1.62, codec 0.125, wire 0.25 exposed, 0.5 hidden"
    )


def test_times_of_an_exchange_are_spread_over_its_steps() -> None:
    line = TimesLine()
    for exchange in range(1, 10):
        line.see(report(4 * exchange, steps=4, wall_s=4.0))
    assert line.see(report(40, steps=4, wall_s=4.0)) == (
        "steps 1 to 40: 1 s a step: computation 0.906, codec 0.0312, wire 0.0625 exposed, 0.125 "
        "hidden"
    )


def test_a_step_that_was_not_seen_from_its_start_does_not_count() -> None:
    line = TimesLine()
    assert line.see(report(1, wall_s=None)) is None
    for step in range(2, 11):
        assert line.see(report(step)) is None
    found = line.see(report(11))
    assert found is not None
    assert found.startswith("steps 2 to 11: 1 s a step")
