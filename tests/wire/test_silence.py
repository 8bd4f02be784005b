"""The last resort against silence: who is told, when, and when nobody is."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch.distributed as dist

from ds_gradprune.wire import silence

TIMED_OUT = RuntimeError("[gloo] Timed out waiting 3000ms for recv operation to complete")
CLOSED = RuntimeError("[gloo] Connection closed by peer [10.0.0.2]:4711")


@pytest.fixture(autouse=True)
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of two, whose group is none."""
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(silence.socket, "gethostname", lambda: "host-b")
    monkeypatch.setattr(silence, "GRACE_S", 0.01)
    monkeypatch.setattr(silence, "BEAT_S", 0.0)


def beat(monkeypatch: pytest.MonkeyPatch, answers: list[Any]) -> list[str]:
    """What a pulse says before it ends the process; nothing if it does not."""
    told: list[str] = []
    closed, closes = threading.Event(), "close" in answers

    def gather(rows: list[Any], mine: Any, group: Any) -> None:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if answer == "close":
            closed.wait()
        for row in rows:
            row.fill_(answer == "done")

    monkeypatch.setattr(dist, "all_gather", gather)
    made = silence.Pulse(
        object(),
        0.01,
        doing=lambda: "saving a checkpoint",
        standing=lambda: "7 steps were done.",
        end=told.append,
    )
    if closes:
        made.close()
        closed.set()
    made._thread.join()
    return told


@pytest.mark.parametrize(
    ("fault", "what"),
    [(TIMED_OUT, "rank 0 has shown no life for 0.01 s"), (CLOSED, "rank 0 has ended, and this")],
)
def test_a_silent_rank_ends_the_process_of_one_that_cannot_go_on(
    fault: Exception, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 was frozen, and a question to its store never came back."""
    [message] = beat(monkeypatch, ["alive", fault])
    assert message.startswith(what)
    assert "says rank 1 of 2 on host-b, while saving a checkpoint." in message
    assert message.endswith("7 steps were done.")


def test_who_is_done_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert beat(monkeypatch, ["alive", "close", TIMED_OUT]) == []
    assert beat(monkeypatch, ["alive", "close", "done"]) == []


def test_one_process_has_no_pulse() -> None:
    with silence.Pulse(None, 1.0, doing=str) as alone:
        assert not alone._thread.is_alive()


def test_a_deadline_holds_for_its_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    ended = threading.Event()

    def end(message: str) -> None:
        told.append(message)
        ended.set()

    monkeypatch.setattr(silence, "end_now", end)
    with silence.deadline(60.0, "finding the other ranks"):
        pass
    with silence.deadline(0.001, "finding the other ranks"):
        assert ended.wait(60)
    assert len(told) == 1
    assert told[0].startswith("finding the other ranks must end within 0.001 s")


def test_what_fails_or_takes_too_long_is_left_behind() -> None:
    never = threading.Event()
    assert silence.within(10.0, lambda: 7) == 7
    assert silence.within(0.01, never.wait) is None
    assert silence.within(10.0, lambda: 1 // 0) is None
    never.set()
