"""A lost island of several ranks comes back: whole, or not at all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_gradprune.deepspeed.agree import gather_texts
from ds_gradprune.errors import TransportError, TransportTimeout
from ds_gradprune.train.parcel import Parcel, opened
from ds_gradprune.wire.bounded import Bounded
from ds_gradprune.wire.carry import hand_over, receive
from ds_gradprune.wire.crew import CrewTransport
from ds_gradprune.wire.door import Candidate, ask
from ds_gradprune.wire.everyone import Everyone
from ds_gradprune.wire.fate import Fate, store_of
from ds_gradprune.wire.meeting import meet
from ds_gradprune.wire.members import LeftOut
from ds_gradprune.wire.transport import Transport
from tests.helpers.crew_ranks import Place, WrapRank
from tests.wire.test_crew_return import Dies, Gone

pytestmark = pytest.mark.timeout(60)

LOST, BEFORE, AFTER = 1, 2, 3
"""Island 1 makes two rounds; those that are there make three after it was let in, or was not."""


class Run:
    """Islands 0 .. 2 of two ranks; rank 3 ends, and both ranks of island 1 come back.

    Attributes:
        seen: name of a rank's life -> the islands and texts of all after each round.
        states: index -> what island 1 was handed over.
        faults: what ranks raised.
    """

    def __init__(self, wrap: WrapRank | None = None) -> None:
        self.place = Place(3, 2, wrap)
        self.seen: dict[str, list[Any]] = {}
        self.states: dict[int, Any] = {}
        self.faults: dict[str, BaseException] = {}
        self.deaf: set[int] = set()

    def play(self) -> Run:
        ranks = [(island, shard) for island in range(3) for shard in range(2)]
        threads = {place: self._start("", place, self._stays) for place in ranks}
        for shard in range(2):
            threads.pop((LOST, shard)).join()
        back = [self._start("back", (LOST, shard), self._returns) for shard in range(2)]
        for thread in [*threads.values(), *back]:
            thread.join()
        return self

    def _start(self, life: str, place: tuple[int, int], work: Callable[..., None]) -> Any:
        name = f"{life}{2 * place[0] + place[1]}"
        seen = self.seen[name] = []

        def run() -> None:
            crew = None
            try:
                ticket = ""
                if life:
                    ticket = meet(Bounded(self.place.store), *place, 2, 10.0)
                crew, everyone = self.place.rank(*place, ticket)
                work(crew, everyone, seen)
            except BaseException as exc:
                self.faults[name] = exc
            if crew is not None:
                crew.close()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def _stays(self, crew: CrewTransport, everyone: Everyone, seen: list[Any]) -> None:
        for _ in range(BEFORE):
            seen.append(told(everyone))
        if everyone.rank == 3:
            return
        while everyone.islands != (0, 2):
            told(everyone)
        if everyone.rank % 2 in self.deaf:
            crew.members.door.shows_life = lambda *_: False  # type: ignore[method-assign]
        while (newcomer := everyone.let_in()) is None:
            time.sleep(0.01)
        if newcomer.here:
            state = {"of": crew.rank, "index": everyone.rank % 2, "whole": newcomer.everywhere}
            weights = torch.arange(100.0 * (1 + everyone.rank % 2))
            hand_over(crew, newcomer.island, lambda: Parcel(state | {"weights": weights}))
        everyone.roll()
        for _ in range(AFTER):
            seen.append(told(everyone))

    def _returns(self, crew: CrewTransport, everyone: Everyone, seen: list[Any]) -> None:
        assert everyone.place == -1
        crew.join()
        self.states[everyone.rank % 2] = state = opened(*receive(crew, 2**20))
        if not state["whole"]:
            return
        assert everyone.roll() == (0, 1, 2)
        for _ in range(AFTER):
            seen.append(told(everyone))


def told(everyone: Everyone) -> Any:
    texts = gather_texts(everyone, str(everyone.rank))
    return everyone.islands, texts


def test_both_ranks_are_let_in_at_one_call() -> None:
    run = Run().play()
    assert isinstance(run.faults.pop("2"), TransportError)  # its other rank has ended
    assert not run.faults, run.faults
    everybody = ((0, 1, 2), [str(rank) for rank in range(6)])
    for rank in (0, 1, 4, 5):
        assert run.seen[str(rank)] == [everybody] * (BEFORE + AFTER)
    for shard in (0, 1):
        assert run.seen[f"back{2 + shard}"] == [everybody] * AFTER
        assert (run.states[shard]["of"], run.states[shard]["index"]) == (0, shard)
        assert len(run.states[shard]["weights"]) == 100 * (1 + shard)


@pytest.mark.parametrize("call", [2, 4])
def test_one_rank_that_dies_while_its_island_is_let_in_keeps_all_of_it_out(call: int) -> None:
    """While it learns where the others are, and while its state travels."""

    def wrap(transport: Transport, island: int, shard: int, epoch: int) -> Transport:
        dies = (island, shard) == (LOST, 1) and epoch > 1
        return Dies(transport, call) if dies else transport

    run = Run(wrap).play()
    assert isinstance(run.faults["back3"], Gone), run.faults
    assert isinstance(run.faults["back2"], TransportError)
    left = ((0, 2), ["0", "1", "4", "5"])
    for rank in (0, 1, 4, 5):
        assert str(rank) not in run.faults
        assert run.seen[str(rank)][BEFORE:] == [left] * AFTER


def test_an_island_that_not_all_crews_have_let_in_is_told_so() -> None:
    run = Run()
    run.deaf = {1}
    run.play()
    left = ((0, 2), ["0", "1", "4", "5"])
    for rank in (0, 1, 4, 5):
        assert str(rank) not in run.faults, run.faults
        assert run.seen[str(rank)][BEFORE:] == [left] * AFTER
    # The rank that was let in hears it with its state, or sees first that it is out again.
    if 0 in run.states:
        assert run.states[0]["whole"] is False
    else:
        assert isinstance(run.faults["back2"], LeftOut), run.faults
    assert isinstance(run.faults["back3"], LeftOut), run.faults


def test_of_two_islands_that_come_back_all_ranks_of_one_ask_first() -> None:
    """The doors of two indices had different islands at them, and no island ever got in."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    doors = [Bounded(store), Bounded(store_of(store, 1))]
    mine, other = Candidate(1), Candidate(2)
    doors[0].set("ask", other.as_json())
    has_turn = Fate(doors[0], 1, 2).has_turn()
    asks: list[str] = []

    def look() -> None:
        asks.append(doors[1].text("ask"))
        if len(asks) == 2:
            doors[0].set("ask", mine.as_json())
        if len(asks) == 4:
            doors[1].set(f"let_in/{mine.ticket}", "3")

    doors[1].set("ask", other.as_json())
    assert ask(doors[1], mine, 5.0, look, has_turn) == 3
    assert asks == [other.as_json()] * 2 + [mine.as_json()] * 2
    assert Fate(doors[0], 0, 2).has_turn() is None


def test_half_an_island_does_not_come_back() -> None:
    store = Bounded(dist.HashStore())  # type: ignore[attr-defined]
    with pytest.raises(TransportTimeout, match="all its 3 ranks, but its ranks 1, 2 did not come"):
        meet(store, 1, 0, 3, 0.3)
    with pytest.raises(TransportTimeout, match=r"all its 2 ranks, but its rank 0 did not come"):
        meet(store, 2, 1, 2, 0.3)


def test_ranks_of_two_lives_do_not_meet() -> None:
    """A life that has met is over for who comes later; one that has ended counts for nobody."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    tickets: list[str] = []

    def come(shard: int) -> None:
        tickets.append(meet(Bounded(store), 1, shard, 2, 10.0))

    for _ in range(2):
        threads = [threading.Thread(target=come, args=(shard,)) for shard in (1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    first, second = tickets[:2], tickets[2:]
    assert first[0] == first[1] != second[0] == second[1]
