"""Islands of two ranks: what crosses between them, and one rank that fails."""

from __future__ import annotations

import pytest

from tests.helpers.fork_ranks import run_forked
from tests.helpers.zero_answers import Found, kinds, of_all, of_one
from tests.helpers.zero_faults import CROSSING

pytestmark = [pytest.mark.distributed, pytest.mark.zero, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def faults() -> Found:
    """Two islands of two ranks."""
    return run_forked(4, "tests.helpers.zero_faults", "run_faults", timeout_s=200)


@pytest.mark.parametrize("kind", kinds(CROSSING))
def test_nothing_dense_crosses_after_the_warmup(faults: Found, kind: str) -> None:
    for found in of_all(faults, "crosses", kind):
        warm, apart = found["warm"], found["apart"]
        assert "allreduce" in warm["outside"]
        assert apart["outside"] == ["all_gather_single"]
        assert apart["sent"] == apart["told"]  # announcements and payloads, and nothing else
        assert apart["told"] < apart["dense"] / 20
        assert {"allreduce", "all_gather_single"} <= set(apart["inside"])


@pytest.mark.parametrize("kind", kinds(["2-fp32", "3-bf16"]))
def test_a_sick_shard_stops_all_with_the_shared_weights_intact(faults: Found, kind: str) -> None:
    found = of_one(faults, "sick", kind)
    assert all(
        "the weights of island 1 hold inf or nan after step 5" in m for m in found["message"]
    )
    assert found["same"] == [True] * 4


def test_one_rank_may_work_alone_inside_shared_weights(faults: Found) -> None:
    for kind in ("0-bf16", "2-fp32"):
        first, *others = of_all(faults, "alone", kind)
        assert first["names"] == 11
        assert first["loss"] > 0.0
        assert all(other["crcs"] == first["crcs"] for other in others)
        assert first["crcs"][:2] == first["crcs"][2:]


def test_ranks_of_an_island_that_do_different_things_are_told(faults: Found) -> None:
    one, two, three, four = of_all(faults, "strays", "2-fp32")
    assert one["message"] == two["message"]
    assert "rank 0 wants the shared weights (state_dict" in one["message"]
    assert "rank 1 ends a step" in one["message"]
    assert three["message"] == four["message"] == "accepted"


def test_a_fault_on_one_rank_ends_its_island_at_once_and_the_others_in_time(faults: Found) -> None:
    one, two, *others = of_all(faults, "fails", "3-bf16")
    assert one["message"] == "WireFormatError: rank 1 of this island: a payload is damaged"
    assert two["message"] == "WireFormatError: a payload is damaged"
    assert one["same"]
    assert two["same"]
    assert one["seconds"] < one["limit"] / 2
    for other in others:
        assert other["message"].startswith(("TransportError:", "TransportTimeout:"))
        assert other["seconds"] < 2 * other["limit"]
