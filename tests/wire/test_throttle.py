"""An emulated link takes the time its bytes need, also when the transfer is hidden."""

from __future__ import annotations

import pytest
import torch

from ds_gradprune.errors import TransportError, TransportTimeout
from ds_gradprune.wire.loopback import LoopbackHub
from ds_gradprune.wire.throttle import RatePoint, ThrottledTransport
from ds_gradprune.wire.transport import Transport
from tests.helpers.ranks import VirtualClock, run_ranks


def throttled(
    inner: Transport, clock: VirtualClock, *points: RatePoint, timeout_s: float = 600.0
) -> ThrottledTransport:
    return ThrottledTransport(inner, points, timeout_s, clock.sleep, clock.now_s)


def seconds(schedule: list[RatePoint], step: int, use: str) -> float:
    """How long a call takes on rank 0 of 4."""

    def work(inner: Transport) -> float:
        clock = VirtualClock(tick_s=0.0)
        transport = throttled(inner, clock, *schedule)
        transport.advance(step)
        rows = torch.zeros((4, 1000), dtype=torch.uint8)
        if use == "gather":
            transport.all_gather(rows[0].clone(), rows)
        elif use == "rows":
            transport.all_to_all(rows.clone(), rows)
        else:
            transport.all_reduce(torch.zeros(1000, dtype=torch.float32))
        return clock.now_s()

    return float(run_ranks(4, work)[0])


def test_charges_what_each_link_carries() -> None:
    schedule = [RatePoint(0, 1000.0, latency_s=0.5), RatePoint(10, 100.0)]
    # 3 peers x 1000 bytes; ring all-reduce: 2 * 3/4 * 4000 bytes.
    assert seconds(schedule, 9, "gather") == pytest.approx(0.5 + 3.0)
    assert seconds(schedule, 10, "gather") == pytest.approx(30.0)
    assert seconds(schedule, 9, "rows") == pytest.approx(0.5 + 3.0)
    assert seconds(schedule, 0, "reduce") == pytest.approx(0.5 + 6.0)


def test_outage_is_paid_once() -> None:
    schedule = [RatePoint(0, 1e9), RatePoint(5, 1e9, outage_s=7.0)]
    assert seconds(schedule, 5, "gather") == pytest.approx(7.0, rel=1e-5)
    assert seconds(schedule, 6, "gather") == pytest.approx(0.0, abs=1e-5)


def test_outage_waits_for_the_next_collective() -> None:
    def work(inner: Transport) -> list[float]:
        clock = VirtualClock(tick_s=0.0)
        points = [RatePoint(0, 1e9, outage_s=3.0), RatePoint(5, 1e9, outage_s=7.0)]
        transport = throttled(inner, clock, *points)
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


def test_computation_hides_the_transfer() -> None:
    """4 s on the link: 3 s of computation leave 1 to wait for, 5 leave nothing."""

    def work(inner: Transport) -> list[float]:
        clock = VirtualClock(tick_s=0.0)
        transport = throttled(inner, clock, RatePoint(0, 1000.0))
        waited = []
        for compute_s in (0.0, 3.0, 5.0):
            call = transport.start_all_reduce(torch.zeros(1000))  # two ranks send 4,000 bytes each
            clock.sleep(compute_s)
            start_s = clock.now_s()
            assert not call.done() or compute_s == 5.0
            call.wait()
            assert call.done()
            waited.append(clock.now_s() - start_s)
        return waited

    assert run_ranks(2, work) == [[4.0, 1.0, 0.0]] * 2


def test_transfers_follow_each_other_on_the_link() -> None:
    """A second start queues behind the first, and a link that was idle is not ahead of its time."""

    def work(inner: Transport) -> list[float]:
        clock = VirtualClock(tick_s=0.0)
        transport = throttled(inner, clock, RatePoint(0, 1000.0))
        ends = []
        first = transport.start_all_reduce(torch.zeros(1000))
        clock.sleep(1.0)
        second = transport.start_all_reduce(torch.zeros(500))
        for call in (second, first):
            call.wait()
            ends.append(clock.now_s())
        clock.sleep(4.0)
        transport.all_reduce(torch.zeros(250))
        return [*ends, clock.now_s()]

    assert run_ranks(2, work) == [[6.0, 6.0, 11.0]] * 2


def test_alone_costs_nothing() -> None:
    clock = VirtualClock(tick_s=0.0)
    transport = throttled(LoopbackHub(1).transport(0), clock, RatePoint(0, 1.0, 1.0, 1.0))
    transport.all_reduce(torch.zeros(100))
    assert clock.now_s() == 0.0


def test_longer_than_the_time_out_is_an_error() -> None:
    def work(inner: Transport) -> float:
        clock = VirtualClock(tick_s=0.0)
        transport = throttled(inner, clock, RatePoint(0, 1.0), timeout_s=2.0)
        call = transport.start_all_reduce(torch.zeros(100))
        clock.sleep(100.0)  # counted from the begin of the wait
        with pytest.raises(
            TransportTimeout,
            match=r"all_reduce of 400 bytes on rank \d of 2 .* within 2 s \(the emulated link",
        ):
            call.wait()
        with pytest.raises(TransportError, match="throttled transport cannot be used after a fail"):
            transport.all_reduce(torch.zeros(1))
        return clock.now_s()

    assert run_ranks(2, work) == [102.0] * 2


def test_needs_a_first_point_and_a_whole_clock() -> None:
    inner = LoopbackHub(1).transport(0)
    with pytest.raises(ValueError, match="point for step 0"):
        ThrottledTransport(inner, [RatePoint(1, 1.0)])
    with pytest.raises(ValueError, match="sleep and clock must be given together"):
        ThrottledTransport(inner, [RatePoint(0, 1.0)], sleep=lambda _: None)
