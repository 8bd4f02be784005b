"""The last resort against silence: who is told, when, and when nobody is."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch.distributed as dist

from launch.support import pulse
from launch.support.peers import Peers
from launch.support.place import Place

TIMED_OUT = RuntimeError("[gloo] Timed out waiting 3000ms for recv operation to complete")
CLOSED = RuntimeError("[gloo] Connection closed by peer [10.0.0.2]:4711")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Peers:
    """Rank 1 of two, whose group is none."""
    peers = Peers(Place())
    peers.rank, peers.world_size, peers.timeout_s = 1, 2, 0.01
    peers.doing, peers.host = "saving a checkpoint", "host-b"
    peers.standing = lambda: "7 steps were done."
    monkeypatch.setattr(peers, "new_group", object)
    monkeypatch.setattr(pulse, "GRACE_S", 0.01)
    monkeypatch.setattr(pulse, "BEAT_S", 0.0)
    return peers


def beat(peers: Peers, monkeypatch: pytest.MonkeyPatch, answers: list[Any]) -> list[str]:
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
    made = pulse.Pulse(peers, told.append)
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
    fault: Exception, what: str, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 was frozen, and a question to its store never came back."""
    [message] = beat(peers, monkeypatch, ["alive", fault])
    assert message.startswith(what)
    assert "says rank 1 of 2 on host-b, while saving a checkpoint." in message
    assert message.endswith("7 steps were done.")


def test_who_is_done_is_not_ended(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    assert beat(peers, monkeypatch, ["alive", "close", TIMED_OUT]) == []
    assert beat(peers, monkeypatch, ["alive", "close", "done"]) == []


def test_one_process_has_no_pulse() -> None:
    with pulse.Pulse(Peers(Place())) as alone:
        assert not alone._thread.is_alive()


def test_a_deadline_holds_for_its_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    ended = threading.Event()

    def end(message: str) -> None:
        told.append(message)
        ended.set()

    monkeypatch.setattr(pulse, "end_now", end)
    with pulse.deadline(60.0, "finding the other ranks"):
        pass
    with pulse.deadline(0.001, "finding the other ranks"):
        assert ended.wait(60)
    assert len(told) == 1
    assert told[0].startswith("finding the other ranks must end within 0.001 s")
