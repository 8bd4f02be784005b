"""A lost island that comes back: all let it in at one call, and whoever dies in it is left out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_gradprune.errors import (
    RankMismatchError,
    TransportError,
    TransportTimeout,
    WireFormatError,
)
from ds_gradprune.train.parcel import Parcel, opened
from ds_gradprune.wire.bounded import Bounded
from ds_gradprune.wire.carry import PIECE_BYTES, hand_over, receive
from ds_gradprune.wire.crew import CrewTransport
from ds_gradprune.wire.door import Candidate, Door, ask
from ds_gradprune.wire.members import Members
from ds_gradprune.wire.transport import Transport, Work
from tests.helpers.crew_ranks import PACE, TIMEOUT_S, Hubs

pytestmark = pytest.mark.timeout(60)

LOST, NUMEL = 1, PIECE_BYTES // 4 + 77
"""The state is of two pieces."""


class Gone(Exception):
    """A process has ended."""


class Dies(Transport):
    """The rank ends before a call of an epoch, counted from 1."""

    def __init__(self, inner: Transport, call: int) -> None:
        self.rank, self.world_size = inner.rank, inner.world_size
        self._inner, self._left = inner, call

    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        return self._next(lambda: self._inner.start_all_gather(payload, out))

    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        return self._inner.start_all_to_all(send, out)

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        return self._next(lambda: self._inner.start_all_reduce(tensor))

    def close(self) -> None:
        self._inner.close()

    def _next(self, start: Callable[[], Work]) -> Work:
        self._left -= 1
        if not self._left:
            raise Gone
        return start()


class Run:
    """Islands 0 .. 2; island 1 is lost before call 3, and comes back when the others see it ask.

    Attributes:
        seen: island -> (call, who took part, sum of 2 ** island) of each call that it finished.
        state: what island 1 was handed over.
        faults: what islands raised.
    """

    def __init__(self, dies: tuple[int, int, int] | None = None) -> None:
        def wrap(transport: Transport, island: int, epoch: int) -> Transport:
            if dies is None or (island, epoch) != dies[:2]:
                return transport
            return Dies(transport, dies[2])

        self.store = dist.HashStore()  # type: ignore[attr-defined]
        self.hubs = Hubs(wrap)
        self.seen: dict[str, list[Any]] = {}
        self.state: Any = None
        self.faults: dict[str, BaseException] = {}

    def play(self) -> Run:
        threads = [self.start(str(island), self.stays, island) for island in range(3)]
        threads[LOST].join()
        threads.append(self.start("back", self.returns, LOST))
        for thread in threads:
            thread.join()
        return self

    def start(self, name: str, work: Callable[..., None], island: int) -> threading.Thread:
        members = Members(self.store, island, self.hubs.opener(island), TIMEOUT_S, 1, PACE)
        seen = self.seen[name] = []

        def run() -> None:
            try:
                work(members, seen)
            except BaseException as exc:
                self.faults[name] = exc
            members.close()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def stays(self, members: Members, seen: list[Any]) -> None:
        members.begin(range(3))
        crew = CrewTransport(members)
        island = crew.rank
        seen += [counted(crew, call) for call in range(3 if island == LOST else 6)]
        if island == LOST:
            return
        while not asks(crew):
            time.sleep(0.01)
        newcomer = crew.let_in()
        if newcomer is not None:
            weights = torch.arange(NUMEL, dtype=torch.float32)
            state = {"from": island, "weights": weights, "counts": [(1, 2.5, None, True)]}
            hand_over(crew, newcomer, lambda: Parcel(state))
        seen += [counted(crew, call) for call in range(6, 9)]

    def returns(self, members: Members, seen: list[Any]) -> None:
        crew = CrewTransport(members)
        assert (crew.place, crew.world_size) == (-1, 0)
        crew.join()
        self.state = opened(*receive(crew, 2**24))
        seen += [counted(crew, call) for call in range(6, 9)]


def asks(crew: CrewTransport) -> bool:
    """Whether some island sees one that asks; headers tell it in a run."""
    total = torch.tensor([float(crew.members.door.candidate is not None)])
    crew.all_reduce(total)
    return bool(total)


def counted(crew: CrewTransport, call: int) -> tuple[int, tuple[int, ...], float]:
    total = torch.full((2,), 2.0**crew.rank)
    crew.all_reduce(total)
    assert float(total[1]) == sum(2.0**island for island in crew.took_part)
    return call, crew.took_part, float(total[0])


def test_an_island_that_comes_back_takes_part_from_one_call_on() -> None:
    run = Run().play()
    assert not run.faults
    assert run.seen["0"] == run.seen["2"]
    assert [(took_part, total) for _, took_part, total in run.seen["0"]] == (
        [((0, 1, 2), 7.0)] * 3 + [((0, 2), 5.0)] * 3 + [((0, 1, 2), 7.0)] * 3
    )
    assert run.seen["back"] == run.seen["0"][6:]
    assert run.state["from"] == 0
    assert run.state["counts"] == [(1, 2.5, None, True)]
    assert torch.equal(run.state["weights"], torch.arange(NUMEL, dtype=torch.float32))


@pytest.mark.parametrize("call", [2, 6])
def test_one_that_dies_while_it_is_let_in_leaves_the_others_at_work(call: int) -> None:
    """Before the first to the fourth call it learns where they are, then its state travels."""
    run = Run((LOST, 2, call)).play()
    assert [*run.faults] == ["back"]
    assert isinstance(run.faults["back"], Gone)
    assert run.seen["0"] == run.seen["2"]
    assert [took_part for _, took_part, _ in run.seen["0"]][3:] == [(0, 2)] * 6


@pytest.mark.parametrize(("gone", "call", "source"), [(0, 3, 2), (0, 7, 2)])
def test_another_one_that_dies_meanwhile_is_left_out_and_the_next_one_sends(
    gone: int, call: int, source: int
) -> None:
    run = Run((gone, 2, call)).play()
    assert isinstance(run.faults.pop(str(gone)), Gone)
    assert not run.faults
    assert run.state["from"] == source
    assert torch.equal(run.state["weights"], torch.arange(NUMEL, dtype=torch.float32))
    assert run.seen["back"] == run.seen[str(source)][6:]
    assert [took_part for _, took_part, _ in run.seen["back"]] == [tuple(sorted((1, source)))] * 3


def test_a_call_that_one_has_not_finished_is_handed_to_it_before_the_newcomer_counts() -> None:
    """Island 2 loses the answer who it is that asks; island 0 has it, and goes to the door."""

    class Late(Dies):
        def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
            self._inner.all_gather(payload, out)
            raise TransportError("a peer has closed the connection")

    def wrap(transport: Transport, island: int, epoch: int) -> Transport:
        return Late(transport, 0) if (island, epoch) == (2, 1) else transport

    run = Run()
    run.hubs = Hubs(wrap)
    run.play()
    assert not run.faults, run.faults
    assert run.seen["0"] == run.seen["2"]
    assert run.seen["back"] == run.seen["0"][6:]


def test_one_that_only_seems_to_ask_is_not_let_in() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    bounded, candidate = Bounded(store), Candidate(1)
    door = Door(bounded)
    bounded.set("ask", candidate.as_json())
    bounded.set(f"asks/{candidate.ticket}", "3")
    for _ in range(3):
        door.look([0, 2])
        assert door.candidate is None
    bounded.set(f"asks/{candidate.ticket}", "4")
    door.look([0, 1, 2])  # the one before it is not given up yet
    assert door.candidate is None
    bounded.set(f"asks/{candidate.ticket}", "5")
    door.look([0, 2])
    assert door.candidate == candidate
    assert not door.shows_life(candidate, 0.1)


def test_who_finds_nobody_alive_says_so() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set("now", "[0, 2]")
    members = Members(store, LOST, Hubs().opener(LOST), 0.1, 1, PACE)
    with pytest.raises(TransportTimeout, match=r"no island of the run has shown life for 0\.4 s"):
        CrewTransport(members).join()
    store.set("over", "")
    with pytest.raises(TransportError, match="the run has ended before island 1 was let in"):
        CrewTransport(members).join()


def test_one_whose_place_is_taken_is_told_so() -> None:
    class Beats(Bounded):
        """Island 1 shows life whenever somebody looks."""

        def text(self, key: str) -> str:
            if key == "beat/1":
                self.add(key, 1)
            return super().text(key)

    store = Beats(dist.HashStore())  # type: ignore[attr-defined]
    store.set("now", "[0, 1]")
    with pytest.raises(RankMismatchError, match="island 1 must be one process, but another one"):
        ask(store, Candidate(1), 5.0)


@pytest.mark.parametrize("flips", ["a weight", "the text"])
def test_a_bit_that_flips_on_the_way_to_a_newcomer_is_found(
    flips: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights were compared afterwards; moments, counters and the law were not."""
    real = Parcel.fill

    def fill(self: Parcel, out: torch.Tensor, start: int) -> None:
        real(self, out, start)
        place = len(self.text) + 8 if flips == "a weight" else len(self.text) - 3
        if start <= place < start + len(out):
            out[place - start] ^= 1

    monkeypatch.setattr(Parcel, "fill", fill)
    run = Run().play()
    assert [*run.faults] == ["back"]
    assert isinstance(run.faults["back"], WireFormatError)
    assert "handed over to island 1 is damaged: its checksum" in str(run.faults["back"])
    assert run.seen["0"] == run.seen["2"]
    assert [took_part for _, took_part, _ in run.seen["0"]][-1] == (0, 2)


def test_more_than_any_run_has_is_not_made_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Parcel.__init__

    def swollen(self: Parcel, value: Any) -> None:
        real(self, value)
        self.nbytes = 2**60

    monkeypatch.setattr(Parcel, "__init__", swollen)
    run = Run().play()
    assert isinstance(run.faults["back"], WireFormatError)
    assert f"at most {2**24} bytes, got {2**60}" in str(run.faults["back"])


@pytest.mark.parametrize("noise", ["", "[", "[1]", '["a", 3]', '[-1, "x"]', "\xff", "[" * 99_999])
def test_noise_in_the_store_is_a_typed_error_and_ends_no_sign_of_life(noise: str) -> None:
    """The thread that shows life looks who asks: an error of another type ended it."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    members = Members(store, 0, Hubs().opener(0), TIMEOUT_S, 1, PACE)
    store.set("ask", noise)
    members.begin([0])
    try:
        deadline_s = time.monotonic() + 5.0
        while store.add("beat/0", 0) < 4 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert store.add("beat/0", 0) >= 4
        if noise:
            with pytest.raises(TransportError, match="must hold an island and its ticket, got"):
                members.door.look([0])
    finally:
        members.close()
