"""Islands of several ranks that may be lost: one rank is lost, and its whole island is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_gradprune.deepspeed.agree import gather_texts
from ds_gradprune.errors import TransportError, TransportTimeout
from ds_gradprune.wire.crew import CrewTransport
from ds_gradprune.wire.everyone import Everyone
from ds_gradprune.wire.members import LeftOut
from ds_gradprune.wire.transport import Transport
from tests.helpers.crew_ranks import on_islands
from tests.wire.test_crew import LastWords

pytestmark = pytest.mark.timeout(60)

CALLS, AT = 5, 2
"""So many rounds; the lost rank leaves in this one, counted from 0."""
GATHER, SUM, TELL = range(3)
"""The calls of a round: of what the island decides on, of a shard, of all ranks."""


def rounds(lost: tuple[int, int], before: int, seen: Any) -> Callable[..., list[Any]]:
    """What each rank knows after each round: islands and rows, its shard's sum, texts of all."""

    def work(crew: CrewTransport, everyone: Everyone) -> list[Any]:
        found: list[Any] = []
        rank, place = everyone.rank, (crew.rank, everyone.rank % 2)
        for number in range(CALLS):
            leaves = place == lost and number == AT
            if leaves and before == GATHER:
                return found
            rows = torch.zeros(crew.world_size, 1, dtype=torch.uint8)
            value = torch.tensor([10 * number + crew.rank], dtype=torch.uint8)
            gather = crew.start_common_gather(value, rows)
            gather.wait()
            if number == AT:
                seen[place] = crew.took_part
            assert gather.took_part is not None
            if leaves and before == SUM:
                return found
            total = torch.full((2,), 2.0**crew.rank)
            crew.all_reduce(total)
            summed = (crew.took_part, total.tolist())
            if leaves and before == TELL:
                return found
            texts = gather_texts(everyone, str(rank) * rank)
            ranks = rows[: len(gather.took_part), 0].tolist()
            found.append((gather.took_part, ranks, summed, everyone.islands, texts))
        return found

    return work


@pytest.mark.parametrize("before", [GATHER, SUM, TELL], ids=["gather", "sum", "tell"])
@pytest.mark.parametrize("shard", [0, 1])
def test_the_other_islands_go_on_alike_though_one_index_has_heard_the_lost_one(
    shard: int, before: int
) -> None:
    """Rank 2 * 1 + shard is gone before its call; the other rank of its island makes it."""
    seen: dict[tuple[int, int], Any] = {}
    found = on_islands(3, 2, rounds((1, shard), before, seen))
    assert len(found[1][shard]) == AT
    assert isinstance(found[1][1 - shard], TransportError)
    assert all(len(found[island][s]) == CALLS for island in (0, 2) for s in (0, 1)), found
    for number in range(CALLS):
        mine = [found[island][s][number] for island in (0, 2) for s in (0, 1)]
        # What the ranks decide on is one on all of them.
        assert (
            len({str((islands, rows, left, texts)) for islands, rows, _, left, texts in mine}) == 1
        )
        # A shard's sum is one on its index.
        assert mine[0][2] == mine[2][2]
        assert mine[1][2] == mine[3][2]
        gone = number > AT or (number == AT and before == GATHER)
        islands = (0, 2) if gone else (0, 1, 2)
        assert mine[0][:2] == (islands, [10 * number + island for island in islands])
        for took_part, total in (mine[0][2], mine[1][2]):
            assert total == [sum(2.0**island for island in took_part)] * 2
        left = [0, 1, 4, 5] if number >= AT else [*range(6)]
        assert mine[0][4] == [str(rank) * rank for rank in left]
    if before == GATHER:
        # The race: index `1 - shard` has heard the lost island, and the other one has not.
        assert seen[0, 1 - shard] == seen[2, 1 - shard] == (0, 1, 2)
        assert seen[0, shard] == seen[2, shard] == (0, 2)


@pytest.mark.parametrize("failing", range(1, 7))
def test_a_call_that_fails_on_one_index_alone_is_handed_on(failing: int) -> None:
    def wrap(transport: Transport, island: int, shard: int, epoch: int) -> Transport:
        here = (island, shard, epoch) == (0, 1, 0)
        return LastWords(transport, failing) if here else transport

    found = on_islands(3, 2, rounds((9, 9), GATHER, {}), wrap)
    assert all(len(rank) == CALLS for island in found for rank in island), found
    assert all(rank == found[0][0] for island in found for rank in island)
    assert {entry[0] for entry in found[0][0]} == {(0, 1, 2)}


def test_a_frozen_rank_ends_its_island_and_no_other() -> None:
    gone_on = threading.Event()

    def work(crew: CrewTransport, everyone: Everyone) -> Any:
        gather_texts(everyone, "a")
        if everyone.rank == 3:
            crew.members._closed.set()  # frozen: it shows no life
            gone_on.wait(30.0)
        texts = gather_texts(everyone, "b")
        gone_on.set()
        return everyone.islands, texts

    found = on_islands(3, 2, work)
    assert found[0] == found[2] == [((0, 2), ["b"] * 4)] * 2
    assert isinstance(found[1][0], (LeftOut, TransportTimeout))
    assert isinstance(found[1][1], TransportError)


def test_too_few_islands_end_typed_on_all_ranks() -> None:
    def work(crew: CrewTransport, everyone: Everyone) -> Any:
        gather_texts(everyone, "a")
        return None if everyone.rank == 3 else gather_texts(everyone, "b")

    found = on_islands(2, 2, work, least=2)
    for fault in found[0]:
        assert isinstance(fault, TransportTimeout)
        assert "min_islands 2 must be alive to go on, but only island 0 answered" in str(fault)


def test_islands_lost_on_different_indices_count_together() -> None:
    """Two of three are lost at once: no crew is below two, and the run is."""

    def work(crew: CrewTransport, everyone: Everyone) -> Any:
        gather_texts(everyone, "a")
        return None if everyone.rank in (2, 5) else gather_texts(everyone, "b")

    found = on_islands(3, 2, work, least=2)
    for fault in found[0]:
        assert isinstance(fault, TransportTimeout)
        assert "min_islands 2 must be alive" in str(fault)


def test_what_fails_on_one_rank_is_told_on_all_of_its_island() -> None:
    class Fails(LastWords):
        """Whatever is tried, this rank does not reach the others."""

    def wrap(transport: Transport, island: int, shard: int, epoch: int) -> Transport:
        if (island, shard) != (0, 1):
            return transport
        if epoch:
            raise TransportError("no route to host")
        return Fails(transport, 1)

    found = on_islands(3, 2, rounds((9, 9), GATHER, {}), wrap)
    assert isinstance(found[0][0], TransportError)
    assert isinstance(found[0][1], TransportError)
    for island in (1, 2):
        assert [entry[0] for entry in found[island][0]][-1] == (1, 2)
        assert found[1] == found[island]
