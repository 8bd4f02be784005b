"""Payloads go round, and what that took is counted."""

from __future__ import annotations

import pytest
import torch

from ds_gradprune.exchange import AllGather
from ds_gradprune.transport.base import Transport
from ds_gradprune.transport.throttle import RatePoint, ThrottledTransport
from tests.helpers.ranks import VirtualClock, run_ranks


def test_time_and_bytes_are_those_of_the_link() -> None:
    def work(inner: Transport) -> tuple[float, int, float, int]:
        clock = VirtualClock(tick_s=0.0)
        slow = ThrottledTransport(inner, [RatePoint(0, 1000.0)], sleep=clock.sleep)
        exchange = AllGather(slow, clock.now_s)
        rows = exchange.gather(torch.full((500,), inner.rank, dtype=torch.uint8))
        assert rows[:, 0].tolist() == [0, 1, 2]
        gathered = exchange.take_traffic()
        exchange.all_reduce(torch.zeros(300))  # 1,200 bytes: a ring sends 2 * 2/3 of them
        reduced = exchange.take_traffic()
        return gathered.comm_time_s, gathered.wire_bytes, reduced.comm_time_s, reduced.wire_bytes

    for gather_s, gather_bytes, reduce_s, reduce_bytes in run_ranks(3, work):
        # The virtual clock counts in 2^-20 s.
        assert (gather_s, reduce_s) == (pytest.approx(1.0), pytest.approx(1.6, abs=2.0**-20))
        assert (gather_bytes, reduce_bytes) == (1000, 1600)


def test_the_receive_buffer_is_kept_and_grows() -> None:
    def work(transport: Transport) -> tuple[bool, int]:
        exchange = AllGather(transport)
        first = exchange.gather(torch.zeros(64, dtype=torch.uint8))
        again = exchange.gather(torch.zeros(32, dtype=torch.uint8))
        larger = exchange.gather(torch.zeros(128, dtype=torch.uint8))
        return first.data_ptr() == again.data_ptr(), larger.numel()

    assert run_ranks(2, work) == [(True, 256)] * 2


def test_alone_nothing_crosses_a_wire() -> None:
    def work(transport: Transport) -> int:
        exchange = AllGather(transport)
        exchange.gather(torch.zeros(64, dtype=torch.uint8))
        exchange.all_reduce(torch.zeros(64))
        return exchange.take_traffic().wire_bytes

    assert run_ranks(1, work) == [0]
