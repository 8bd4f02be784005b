"""What a run shows: its messages."""

from __future__ import annotations

import logging

from launch.support.shown import BURST, DECISION_LINES, Messages


def record(level: int, text: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("ds_gradprune.decisions", level, "", 0, text, args, None)


def test_of_many_decisions_some_are_counted_only() -> None:
    """A run on a busy host changed its density every fourth step: 240 lines on the screen."""
    steps = 1000
    messages, lines = Messages(steps), list[str]()
    messages.show = lines.append
    for step in range(4, steps, 4):
        messages.emit(record(logging.INFO, "step %d: less (%s)", step, "over_budget"))
    assert lines[:BURST] == [f"step {4 * i}: less (over_budget)" for i in range(1, BURST + 1)]
    assert DECISION_LINES <= len(lines) <= DECISION_LINES + 2 * BURST
    left_out = [int(line.split("; ")[1].split()[0]) for line in lines if "; " in line]
    assert len(lines) + sum(left_out) > len(range(4, steps, 4)) - steps // DECISION_LINES
    assert lines[-1].endswith("changes before it are in the log only")


def test_warnings_and_verdicts_are_always_shown() -> None:
    messages, lines = Messages(40), list[str]()
    messages.show = lines.append
    for step in range(60):
        messages.emit(record(logging.WARNING, "step %d: cannot be met", 1))
        messages.emit(record(logging.INFO, "dense 1.8 s a step: pruning pays here"))
        assert len(lines) == 2 * step + 2
