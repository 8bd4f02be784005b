"""One table of checks, every transport: loopback, throttled loopback, torch.distributed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_gradprune.errors import RankMismatchError, TransportError, TransportTimeout
from ds_gradprune.transport.base import Transport
from ds_gradprune.transport.loopback import LoopbackHub
from ds_gradprune.transport.throttle import RatePoint, ThrottledTransport
from tests.helpers.ranks import VirtualClock, run_processes, run_ranks

CHECKS = [
    "gathers_in_rank_order",
    "gathers_megabytes",
    "empty_payload",
    "sums_in_place",
    "buffers_are_reusable",
]


def gathers_in_rank_order(transport: Transport) -> list[Any]:
    """Row r holds rank r's bytes, for every r."""
    payload = torch.full((5,), 10 + transport.rank, dtype=torch.uint8)
    out = torch.zeros((transport.world_size, 5), dtype=torch.uint8)
    transport.all_gather(payload, out)
    assert out.tolist() == [[10 + r] * 5 for r in range(transport.world_size)]
    return out.tolist()


def gathers_megabytes(transport: Transport) -> list[Any]:
    """More than is sent in one piece, and no whole number of pieces."""
    size = 6 * 256 * 1024 + 13

    def payload_of(rank: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(rank)
        return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)

    out = torch.zeros((transport.world_size, size), dtype=torch.uint8)
    transport.all_gather(payload_of(transport.rank), out)
    for rank in range(transport.world_size):
        assert torch.equal(out[rank], payload_of(rank))
    return [int(out.sum(dtype=torch.int64))]


def empty_payload(transport: Transport) -> list[Any]:
    """No bytes are a payload too."""
    out = torch.zeros((transport.world_size, 0), dtype=torch.uint8)
    transport.all_gather(torch.zeros(0, dtype=torch.uint8), out)
    return out.tolist()


def sums_in_place(transport: Transport) -> list[Any]:
    """The dense path: small integers, so every order of addition gives the same bits."""
    vector = torch.arange(6, dtype=torch.float32).view(2, 3) * (transport.rank + 1)
    transport.all_reduce(vector)
    factor = sum(r + 1 for r in range(transport.world_size))
    assert torch.equal(vector, torch.arange(6, dtype=torch.float32).view(2, 3) * factor)
    return vector.tolist()


def buffers_are_reusable(transport: Transport) -> list[Any]:
    """After the call the payload belongs to the caller again: overwrite it, nobody notices."""
    payload = torch.empty(3, dtype=torch.uint8)
    seen = []
    for turn in range(4):
        payload.fill_(turn * 10 + transport.rank)
        out = torch.zeros((transport.world_size, 3), dtype=torch.uint8)
        transport.all_gather(payload, out)
        payload.fill_(255)
        seen.append(out[:, 0].tolist())
    assert seen == [[t * 10 + r for r in range(transport.world_size)] for t in range(4)]
    return seen


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("check", CHECKS)
def test_loopback(check: str, world_size: int) -> None:
    results = run_ranks(world_size, globals()[check])
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("check", CHECKS)
def test_throttled(check: str) -> None:
    def work(inner: Transport) -> Any:
        clock = VirtualClock()
        with ThrottledTransport(inner, [RatePoint(0, 1e6)], sleep=clock.sleep) as transport:
            return globals()[check](transport)

    results = run_ranks(3, work)
    assert all(result == results[0] for result in results)


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS)
def test_torch(check: str) -> None:
    results = run_processes(2, "tests.helpers.process_main", "transport_contract", {"name": check})
    assert results[0] == results[1]


@pytest.mark.distributed
def test_torch_absent_peer_is_a_transport_error_in_time() -> None:
    answer, absent = run_processes(2, "tests.helpers.process_main", "transport_timeout")
    assert absent == "absent"
    # Which of the two depends on whether the peer's socket closes before the timeout.
    assert answer.startswith(("TransportTimeout:", "TransportError:"))
    assert "all_gather on rank 0 of 2" in answer


def test_loopback_absent_peer_times_out() -> None:
    transport = LoopbackHub(2, timeout_s=0.05).transport(0)
    with pytest.raises(TransportTimeout, match="all_reduce had no answer from every rank"):
        transport.all_reduce(torch.zeros(1))


def test_loopback_refuses_unequal_calls() -> None:
    def work(transport: Transport) -> None:
        size = 3 + transport.rank
        out = torch.empty((2, size), dtype=torch.uint8)
        transport.all_gather(torch.zeros(size, dtype=torch.uint8), out)

    with pytest.raises(RankMismatchError, match=r"rank 0: all_gather \(3,\).*rank 1"):
        run_ranks(2, work)


def test_closed_loopback_says_so() -> None:
    transport = LoopbackHub(1).transport(0)
    transport.close()
    transport.close()
    with pytest.raises(TransportError, match="closed"):
        transport.all_reduce(torch.zeros(1))


def _throttled_seconds(schedule: list[RatePoint], step: int, use: str) -> float:
    clock = VirtualClock(tick_s=0.0)

    def work(inner: Transport) -> float:
        # One clock per rank; rank 0's is read at the end.
        mine = clock if inner.rank == 0 else VirtualClock(0.0)
        transport = ThrottledTransport(inner, schedule, sleep=mine.sleep)
        transport.advance(step)
        before = mine.now_s()
        if use == "gather":
            out = torch.empty((4, 1000), dtype=torch.uint8)
            transport.all_gather(torch.zeros(1000, dtype=torch.uint8), out)
        else:
            transport.all_reduce(torch.zeros(1000, dtype=torch.float32))
        return mine.now_s() - before

    return run_ranks(4, work)[0]


def test_throttle_charges_what_each_link_carries() -> None:
    schedule = [RatePoint(0, 1000.0, latency_s=0.5), RatePoint(10, 100.0)]
    # all_gather: 3 peers x 1000 bytes; ring all-reduce: 2 * 3/4 * 4000 bytes.
    assert _throttled_seconds(schedule, 9, "gather") == pytest.approx(0.5 + 3.0)
    assert _throttled_seconds(schedule, 10, "gather") == pytest.approx(30.0)
    assert _throttled_seconds(schedule, 0, "reduce") == pytest.approx(0.5 + 6.0)


def test_throttle_outage_is_paid_once() -> None:
    schedule = [RatePoint(0, 1e9), RatePoint(5, 1e9, outage_s=7.0)]
    assert _throttled_seconds(schedule, 5, "gather") == pytest.approx(7.0, rel=1e-5)
    assert _throttled_seconds(schedule, 6, "gather") == pytest.approx(0.0, abs=1e-5)


def test_throttle_outage_waits_for_the_next_collective() -> None:
    def work(inner: Transport) -> list[float]:
        clock = VirtualClock(tick_s=0.0)
        points = [RatePoint(0, 1e9, outage_s=3.0), RatePoint(5, 1e9, outage_s=7.0)]
        transport = ThrottledTransport(inner, points, sleep=clock.sleep)
        waited = []
        for step in range(1, 9):
            transport.advance(step)
            if step % 3 == 0 or step == 8:
                start_s = clock.now_s()
                transport.all_reduce(torch.zeros(1))
                waited.append(clock.now_s() - start_s)
        return waited

    for waited in run_ranks(2, work):
        assert waited == pytest.approx([3.0, 7.0, 0.0], abs=1e-5)


def test_throttle_longer_than_the_timeout_is_an_error() -> None:
    def work(inner: Transport) -> None:
        clock = VirtualClock()
        transport = ThrottledTransport(inner, [RatePoint(0, 1.0)], timeout_s=2.0, sleep=clock.sleep)
        transport.all_reduce(torch.zeros(100))

    with pytest.raises(TransportTimeout, match=r"within 2 s \(the emulated link needs"):
        run_ranks(2, work)


def test_throttle_needs_a_first_point() -> None:
    inner = LoopbackHub(1).transport(0)
    with pytest.raises(ValueError, match="point for step 0"):
        ThrottledTransport(inner, [RatePoint(1, 1.0)])
