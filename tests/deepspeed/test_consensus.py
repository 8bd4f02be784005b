"""The ranks of an island agree: signals, outcomes, errors of one, and ranks that stray."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.filterwarnings("default")

from ds_gradprune.deepspeed.consensus import InsideIsland, Occasion, _history  # noqa: E402
from ds_gradprune.errors import (  # noqa: E402
    GradPruneError,
    RankMismatchError,
    TransportTimeout,
    WireFormatError,
)
from ds_gradprune.law.signals import RankSignals  # noqa: E402
from ds_gradprune.wire.transport import Transport  # noqa: E402
from tests.helpers.loopback_ranks import on_ranks  # noqa: E402


def signals(rank: int, **changes: Any) -> RankSignals:
    fields: dict[str, Any] = {
        "loss": 1.0 + rank,
        "nonfinite": False,
        "compute_time_s": 0.5 - 0.1 * rank,
        "codec_time_s": 0.01 * rank,
        "comm_time_s": 0.1,
        "wire_bytes": 70,
        "agreement": 7 + rank,
        "written": rank == 1,
    }
    return RankSignals(**(fields | changes))


def agree(world_size: int, **of_rank_1: Any) -> list[tuple[RankSignals, int]]:
    def work(transport: Transport) -> Any:
        mine = signals(transport.rank, **(of_rank_1 if transport.rank == 1 else {}))
        return InsideIsland(transport, 3).agree(mine, 100 + transport.rank)

    return on_ranks(world_size, work)


def test_an_island_speaks_with_one_voice() -> None:
    for rank, (island, dense_bytes) in enumerate(agree(2)):
        assert dense_bytes == 201
        assert island == signals(
            0, loss=1.5, codec_time_s=0.01, written=True, agreement=7 + rank, wire_bytes=70
        )


@pytest.mark.parametrize("island", [0, 1])
def test_ranks_that_must_have_one_history_say_so_or_nothing_that_another_says(island: int) -> None:
    def work(transport: Transport) -> Any:
        inside = InsideIsland(transport, 2)
        same = inside.agree(signals(0), 0, island=island)[0].agreement
        return same, inside.agree(signals(transport.rank), 0, island=island)[0].agreement

    (one, apart), other = on_ranks(2, work)
    assert other == (one, apart)
    assert one == 7
    assert apart not in (7, 8)
    assert apart == _history([7.0, 8.0], island) != _history([7.0, 8.0], 1 - island)


def test_what_one_rank_does_not_know_the_island_does_not_know() -> None:
    (island, _), _ = agree(2, loss=None, compute_time_s=None)
    assert island.loss is None
    assert island.compute_time_s is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_unknown_one(loss: float) -> None:
    (island, _), _ = agree(2, loss=loss)
    assert island.loss == math.inf


def test_a_rank_alone_agrees_with_itself() -> None:
    alone = InsideIsland(None, 3)
    assert alone.agree(signals(0), 9) == (signals(0), 9)
    assert alone.outcome(bad=[2], wire_bytes=5) == ([2], 5)
    alone.meet(Occasion.OWN)
    with pytest.raises(WireFormatError, match="cut"), alone.together():
        raise WireFormatError("cut")


def test_bytes_are_summed_and_sick_islands_united() -> None:
    def work(transport: Transport) -> Any:
        return InsideIsland(transport, 12).outcome(bad=[5 * transport.rank], wire_bytes=30)

    assert on_ranks(3, work) == [([0, 5, 10], 90)] * 3


@pytest.mark.parametrize("kind", [WireFormatError, RuntimeError])
def test_an_error_of_one_rank_is_raised_on_all(kind: type[Exception]) -> None:
    def work(transport: Transport) -> Any:
        with InsideIsland(transport, 2).together():
            if transport.rank == 1:
                raise kind("no memory")

    def caught(transport: Transport) -> Any:
        try:
            work(transport)
        except RuntimeError as exc:
            return exc

    one, two, three = on_ranks(3, caught)
    assert type(two) is kind
    assert str(two) == "no memory"
    named = "" if kind is WireFormatError else "RuntimeError: "
    for other in (one, three):
        assert str(other) == f"rank 1 of this island: {named}no memory"
        assert isinstance(other, GradPruneError)


def test_ranks_that_do_different_things_are_told_which() -> None:
    def work(transport: Transport) -> None:
        inside = InsideIsland(transport, 2)
        if transport.rank == 0:
            inside.meet(Occasion.SHARED)
        else:
            inside.agree(signals(1), 1)

    for answer in on_ranks(2, work):
        assert isinstance(answer, RankMismatchError)
        assert "rank 0 wants the shared weights (state_dict, a save" in str(answer)
        assert "rank 1 ends a step. With several ranks in an island" in str(answer)


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_the_time_out() -> None:
    def work(transport: Transport) -> None:
        if transport.rank == 0:
            InsideIsland(transport, 2).meet(Occasion.SHARED)

    answer, _ = on_ranks(2, work, timeout_s=0.2)
    assert isinstance(answer, TransportTimeout)
    assert "rank 0 of an island wants the shared weights" in str(answer)
    assert "enter engine.gradprune.shared_weights() on all ranks" in str(answer)
