"""Ranks that may be lost: every call ends alike on all that are left, and counts once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_gradprune.deepspeed.agree import gather_texts
from ds_gradprune.errors import TransportError, TransportTimeout
from ds_gradprune.wire.bounded import Bounded
from ds_gradprune.wire.crew import CrewTransport
from ds_gradprune.wire.members import LeftOut
from ds_gradprune.wire.transport import Transport, Work
from tests.helpers.crew_ranks import on_crew
from tests.helpers.ranks import run_processes

pytestmark = pytest.mark.timeout(60)


class LastWords(Transport):
    """A call fails on this rank though all others get everything.

    That is what it looks like when a peer dies while its bytes are on their way.
    """

    def __init__(self, inner: Transport, calls: int) -> None:
        self.rank, self.world_size = inner.rank, inner.world_size
        self._inner = inner
        self._calls_left = calls

    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        return self._started(self._inner.start_all_gather(payload, out))

    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        return self._inner.start_all_to_all(send, out)

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        return self._started(self._inner.start_all_reduce(tensor))

    def close(self) -> None:
        self._inner.close()

    def _started(self, work: Work) -> Work:
        self._calls_left -= 1
        if not self._calls_left:
            work.wait()
            raise TransportError("a peer has closed the connection")
        return work


def gathered(crew: CrewTransport, value: int) -> tuple[tuple[int, ...], list[int]]:
    """Who took part, and everybody's value."""
    out = torch.zeros(crew.world_size, 1, dtype=torch.uint8)
    work = crew.start_all_gather(torch.tensor([value], dtype=torch.uint8), out)
    work.wait()
    assert work.took_part is not None
    return work.took_part, out[: len(work.took_part), 0].tolist()


def counts(last: int, *, lost: int = -1, at: int = -1) -> Callable[[CrewTransport], Any]:
    """Gather and sum in turn; the lost island leaves before a call."""

    def work(crew: CrewTransport) -> list[Any]:
        found: list[Any] = []
        for call in range(last):
            if crew.rank == lost and call == at:
                return found
            found.append(gathered(crew, 10 * call + crew.rank))
            total = torch.full((3,), 2.0**crew.rank)
            crew.all_reduce(total)
            found.append(total.tolist())
        crew.leave()
        return found

    return work


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_the_others_go_on_with_equal_results(lost: int) -> None:
    found = on_crew(3, counts(6, lost=lost, at=3))
    left = [island for island in range(3) if island != lost]
    assert found[left[0]] == found[left[1]]
    assert found[lost] == found[left[0]][:6]
    assert found[left[0]][4] == ((0, 1, 2), [20, 21, 22])
    assert found[left[0]][6] == (tuple(left), [30 + island for island in left])
    assert found[left[0]][7] == [sum(2.0**island for island in left)] * 3


@pytest.mark.parametrize("failing", range(1, 9))
def test_a_call_that_some_have_finished_is_handed_to_the_others_and_not_made_twice(
    failing: int,
) -> None:
    """Odd calls gather, even ones sum."""

    def wrap(transport: Transport, island: int, epoch: int) -> Transport:
        return LastWords(transport, failing) if (island, epoch) == (1, 0) else transport

    made: list[int] = []

    def work(crew: CrewTransport) -> Any:
        result = counts(4)(crew)
        made.append(crew._done)
        return result

    found = on_crew(3, work, wrap)
    assert found[0] == found[1] == found[2], found
    assert [entry for entry in found[0][::2]] == [
        ((0, 1, 2), [10 * call, 10 * call + 1, 10 * call + 2]) for call in range(4)
    ]
    assert found[0][1::2] == [[7.0] * 3] * 4
    assert made == [9, 9, 9]


def test_two_are_lost_one_after_the_other() -> None:
    def work(crew: CrewTransport) -> Any:
        return counts(9, lost=crew.rank, at=(99, 3, 6)[crew.rank])(crew)

    found = on_crew(3, work)
    assert [took_part for took_part, _ in found[0][::2]] == (
        [(0, 1, 2)] * 3 + [(0, 2)] * 3 + [(0,)] * 3
    )
    assert found[2] == found[0][:12]


def test_calls_that_are_started_together_end_in_order() -> None:
    def work(crew: CrewTransport) -> Any:
        if crew.rank == 1:
            gathered(crew, 9)
            return None
        gathered(crew, 9)
        sums = [torch.full((2,), float(number + 1)) for number in range(3)]
        works = [crew.start_all_reduce(tensor) for tensor in sums]
        works[2].wait()
        assert all(one.done() for one in works)
        return [tensor.tolist() for tensor in sums], [one.took_part for one in works]

    found = on_crew(3, work)
    assert found[0] == found[2] == ([[2.0] * 2, [4.0] * 2, [6.0] * 2], [(0, 2)] * 3)


def test_texts_of_all_lengths_come_from_those_that_are_left() -> None:
    def work(crew: CrewTransport) -> Any:
        first = gather_texts(crew, "a" * crew.rank)
        return first if crew.rank == 0 else [first, gather_texts(crew, "b" * crew.rank)]

    found = on_crew(3, work)
    assert found[1] == found[2] == [["", "a", "aa"], ["b", "bb"]]


def test_below_the_least_number_the_run_ends_typed() -> None:
    found = on_crew(3, counts(4, lost=1, at=2), least=3)
    for island in (0, 2):
        assert isinstance(found[island], TransportTimeout)
        assert "min_islands 3 must be alive to go on" in str(found[island])


def test_an_island_that_comes_too_late_is_left_out() -> None:
    gone_on = threading.Event()

    def work(crew: CrewTransport) -> Any:
        gathered(crew, 0)
        if crew.rank == 2:
            crew.members._closed.set()  # frozen: it shows no life
            gone_on.wait(30.0)
            gathered(crew, 1)  # what the others had brought lies there still
        found = gathered(crew, 1)
        gone_on.set()
        return found

    found = on_crew(3, work)
    assert found[0] == found[1] == ((0, 1), [1, 1])
    assert isinstance(found[2], LeftOut)
    assert "islands 0, 1 have gone on without island 2" in str(found[2])


def test_of_two_that_live_but_do_not_reach_each_other_one_is_left_out() -> None:
    """A link that loses packets in one direction: all reach the store."""

    def wrap(transport: Transport, island: int, epoch: int) -> Transport:
        if epoch == 0:
            return LastWords(transport, 3) if island == 1 else transport
        if epoch == 1 and island:
            raise TransportError("no answer from the other one")
        return transport

    found = on_crew(3, counts(4), wrap)
    assert found[0] == found[1]
    assert [took_part for took_part, _ in found[0][::2]] == [(0, 1, 2)] * 2 + [(0, 1)] * 2
    assert isinstance(found[2], LeftOut)


def test_after_a_failure_every_call_says_so() -> None:
    def work(crew: CrewTransport) -> Any:
        if crew.rank == 1:
            return None
        with pytest.raises(TransportTimeout, match="min_islands 2"):
            gathered(crew, 0)
        with pytest.raises(TransportError, match="cannot be used after a failure: gradient_prun"):
            gathered(crew, 0)
        return "told"

    assert on_crew(2, work, least=2)[0] == "told"


def test_rows_for_each_island_alone_are_refused() -> None:
    rows = torch.zeros(2, 1, dtype=torch.uint8)
    found = on_crew(2, lambda crew: crew.all_to_all(rows, rows.clone()))
    assert all("exchange with all_gather alone" in str(fault) for fault in found)


def test_a_store_that_fails_is_told() -> None:
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Broken pipe\nat socket.cpp")

    with pytest.raises(TransportError, match=r"cannot be asked who is alive: Broken pipe\. Its"):
        Bounded(Gone()).check(["epoch"])


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_processes_go_on_without_one(how: str) -> None:
    """Over gloo; the store lives apart, so the first one may be lost as well."""
    lost = 0 if how == "killed" else 2
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    given = {"port": store.port, "lost": lost, "how": how}
    told = run_processes(3, "tests.helpers.crew_main", "count_on", given, timeout_s=50)
    left = [island for island in range(3) if island != lost]
    assert told[left[0]]["rows"] == told[left[1]]["rows"]
    assert len(told[left[0]]["rows"]) == 80
    assert told[left[0]]["took_part"] == left
    # Silence of 5 s, or a time-out of 4 s first; then it is decided.
    assert all(told[island]["longest_s"] < 10.0 for island in left)
    if how == "stopped":
        assert "have gone on without island 2" in told[lost]["fault"]
