"""A bar on a terminal, plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import io

import pytest

from textgen.progress import PLAIN_LINES, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def walk(progress: Progress, first: int, last: int) -> None:
    for step in range(first, last + 1):
        progress.step(step, {"loss": f"{1 / step:.2f}", "density": "5.00 %"})


@pytest.mark.parametrize("total", [1, 7, 40, 41, 1000, 12345])
def test_plain_lines_are_few_and_the_last_step_is_shown(total: int) -> None:
    stream = io.StringIO()
    walk(Progress(total, stream=stream), 1, total)
    lines = stream.getvalue().splitlines()
    assert min(total, PLAIN_LINES) <= len(lines) <= 2 * PLAIN_LINES
    assert lines[-1] == f"step {total}/{total}  loss {1 / total:.2f}  density 5.00 %  left 00:00"


def test_time_left_follows_the_steps_of_this_run() -> None:
    stream, seconds = io.StringIO(), iter([100.0, 104.0])
    progress = Progress(50, 10, stream=stream, clock=seconds.__next__)
    progress.step(12, {"loss": "1.00"})  # two steps took four seconds; 38 are left
    assert stream.getvalue() == "step 12/50  loss 1.00  left 01:16\n"


def test_terminal_gets_a_bar_with_the_fields() -> None:
    stream = Terminal()
    progress = Progress(10, 4, stream=stream)
    progress.note("validation loss 1.0")
    walk(progress, 5, 10)
    progress.close()
    progress.close()
    shown = stream.getvalue()
    assert "validation loss 1.0\n" in shown
    assert "4/10" in shown
    assert "10/10" in shown
    assert "loss=0.10, density=5.00 %" in shown


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_ranks_write_nothing(stream: io.StringIO) -> None:
    progress = Progress(3, enabled=False, stream=stream)
    walk(progress, 1, 3)
    progress.note("note")
    progress.close()
    assert stream.getvalue() == ""


def test_notes_are_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    Progress(3, stream=stream).note("note")
    assert stream.getvalue() == "note\n"
