"""One table of checks, every transport; `test_transport_mpi` has it for MPI."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_gradprune.errors import RankMismatchError, TransportError, TransportTimeout
from ds_gradprune.wire.loopback import LoopbackHub
from ds_gradprune.wire.throttle import RatePoint, ThrottledTransport
from ds_gradprune.wire.transport import Transport, no_answer, peers_of
from tests.helpers.ranks import VirtualClock, run_processes, run_ranks
from tests.helpers.transport_checks import CHECKS, run_check


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("check", CHECKS)
def test_loopback(check: str, world_size: int) -> None:
    results = run_ranks(world_size, lambda transport: run_check(check, transport))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("check", CHECKS)
def test_throttled(check: str, world_size: int) -> None:
    def work(inner: Transport) -> Any:
        clock = VirtualClock()
        points = [RatePoint(0, 1e6)]
        return run_check(
            check, ThrottledTransport(inner, points, sleep=clock.sleep, clock=clock.now_s)
        )

    results = run_ranks(world_size, work)
    assert all(result == results[0] for result in results)


@pytest.fixture(scope="module")
def over_torch() -> list[dict[str, Any]]:
    """What each of two processes on gloo found; one start for all checks."""
    arguments = {"names": list(CHECKS)}
    return run_processes(2, "tests.helpers.process_main", "transport_contract", arguments)


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS)
def test_torch(check: str, over_torch: list[dict[str, Any]]) -> None:
    assert over_torch[0][check] == over_torch[1][check]


# --- faults ---------------------------------------------------------------------------------------


def test_message_of_a_time_out_names_everything() -> None:
    assert str(no_answer("all_gather", 0, 2, 600.0)) == (
        "all_gather on rank 0 of 2 had no answer from rank 1 within 600 s. Usual causes: the link "
        "is dead or far slower than timeout_s allows; a host is gone (look for its last lines of "
        "output); a rank made fewer steps than the others (uneven data: give every rank the same "
        "number of batches)"
    )
    assert "from at least one of ranks 0, 2 within" in str(no_answer("all_reduce", 1, 3, 1.0))
    assert peers_of(0, 1) == "nobody"
    assert peers_of(0, 12) == "ranks 1, 2, 3, 4, 5, 6, 7, 8, ..."


def test_loopback_absent_peer_times_out_once_and_for_all() -> None:
    transport = LoopbackHub(2, timeout_s=0.05).transport(0)
    work = transport.start_all_reduce(torch.zeros(1))
    assert not work.done()
    for _ in range(2):
        with pytest.raises(
            TransportTimeout, match=r"all_reduce on rank 0 of 2 .* from rank 1 with"
        ):
            work.wait()
    assert work.done()
    with pytest.raises(TransportError, match=r"cannot be used after a failed call: .*no answer"):
        transport.start_all_reduce(torch.zeros(1))


def test_loopback_abort_wakes_who_waits() -> None:
    def work(transport: Transport) -> None:
        if transport.rank == 1:
            raise KeyError("gone")
        with pytest.raises(TransportError, match="hub was aborted before rank 1 came"):
            transport.all_reduce(torch.zeros(1))

    with pytest.raises(KeyError, match="gone"):
        run_ranks(3, work)


def test_loopback_refuses_unequal_calls() -> None:
    def work(transport: Transport) -> None:
        size = 3 + transport.rank
        out = torch.empty((2, size), dtype=torch.uint8)
        transport.all_gather(torch.zeros(size, dtype=torch.uint8), out)

    with pytest.raises(RankMismatchError, match=r"rank 0: all_gather \(3,\).*rank 1"):
        run_ranks(2, work)


def test_loopback_delay_is_told_of_every_wait() -> None:
    told: list[tuple[str, int, int]] = []

    def work(transport: Transport) -> None:
        first = transport.start_all_reduce(torch.zeros(1))
        transport.all_reduce(torch.zeros(1))
        first.wait()

    run_ranks(2, work, delay=lambda *call: told.append(call))
    assert [call[1:] for call in told if call[1] == 0] == [(0, 1), (0, 0)]
    assert {call[0] for call in told} == {"all_reduce"}


def test_loopback_adds_in_rank_order() -> None:
    # fp32: 1e8 + 1 - 1e8 is 0 in this order, 1 in another.
    parts = [1e8, 1.0, -1e8]

    def work(transport: Transport) -> float:
        vector = torch.tensor([parts[transport.rank]])
        transport.all_reduce(vector)
        return float(vector)

    assert run_ranks(3, work) == [0.0, 0.0, 0.0]


@pytest.mark.distributed
def test_torch_absent_peer_is_a_time_out_that_names_it() -> None:
    (first, second), _ = run_processes(
        2, "tests.helpers.process_main", "transport_faults", {"fault": "absent"}
    )
    assert first.startswith(
        "TransportTimeout: all_gather on rank 0 of 2 had no answer from rank 1 within 1 s. Usual "
    )
    assert second.startswith("TransportError: the torch transport cannot be used after a failed")


@pytest.mark.distributed
def test_torch_peer_whose_process_ends_is_told_in_a_clean_sentence() -> None:
    (first, second), _ = run_processes(
        2, "tests.helpers.process_main", "transport_faults", {"fault": "ends"}
    )
    assert first.startswith(
        "TransportError: all_gather on rank 0 of 2 failed: rank 1 (at 127.0.0.1)"
    )
    assert first.endswith(
        "has closed the connection. Its process has ended or its host is gone: "
        "look for the last lines of its output"
    )
    assert first.isascii()
    assert second.startswith("TransportError: the torch transport cannot be used after a failed")
