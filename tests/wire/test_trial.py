"""A trial of the link estimates what a dense exchange takes, and costs little where it is slow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.throttle import RatePoint, ThrottledTransport
from ds_gradprune.wire.transport import Transport, Work
from ds_gradprune.wire.trial import MOST_PIECES, PIECE_BYTES, dense_seconds
from tests.helpers.loopback_ranks import on_ranks
from tests.helpers.ranks import VirtualClock


class Counting(AllGather):
    """Counts its sums, and may stall in one of them, or be held up a little in each."""

    def __init__(self, transport: Transport, clock: VirtualClock, stalls: int | None) -> None:
        super().__init__(transport)
        self.clock, self.stalls, self.sizes = clock, stalls, list[int]()
        self.holds_up_s = 0.0

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        self.sizes.append(tensor.numel())
        if tensor.numel() > 1:
            self.clock.sleep(self.holds_up_s)
        if len(self.sizes) == self.stalls:
            self.clock.sleep(0.5)
        return super().start_all_reduce(tensor)


def trial(
    rate_mbit: float,
    nbytes: int = 40_000_000,
    latency_s: float = 0.0,
    stalls: int | None = None,
    holds_up_s: float = 0.0,
) -> list[Any]:
    """On two ranks: the estimate, the sizes of the sums, how long it took, bytes in a report."""

    def main(inner: Transport) -> Any:
        clock = VirtualClock(2.0**-20)
        point = RatePoint(0, rate_mbit * 1e6 / 8, latency_s)
        link = ThrottledTransport(inner, [point], 60.0, sleep=clock.sleep, clock=clock.now_s)
        channel = Counting(link, clock, stalls if inner.rank else None)
        channel.holds_up_s = holds_up_s
        found = dense_seconds(channel, nbytes, clock.now_s)
        return found, channel.sizes, clock.now_s(), channel.take_wire_bytes()

    return on_ranks(2, main)


@pytest.mark.parametrize("rate_mbit", [1.0, 20.0, 100.0, 1000.0])
@pytest.mark.parametrize("latency_s", [0.0, 0.01])
def test_estimate_is_what_the_bytes_take(rate_mbit: float, latency_s: float) -> None:
    for found, _, _, counted in trial(rate_mbit, latency_s=latency_s):
        assert found == pytest.approx(latency_s + 40_000_000 * 8 / (rate_mbit * 1e6), rel=0.02)
        assert counted == 0


@pytest.mark.parametrize(
    ("rate_mbit", "factors"),
    # 32 kB take 2.6 s, 0.26 s, 26 ms, 2.6 ms and 0.26 ms.
    [
        (0.1, [1, 1]),
        (1.0, [1, 1]),
        (10.0, [1, 1, 1, 1, 1]),
        (100.0, [1, 1, 4, 16, 64, 64]),
        (1000.0, [1, 1, 4, 16, 64, 256, 512, 512]),
    ],
)
def test_pieces_grow_until_they_take_long(rate_mbit: float, factors: list[int]) -> None:
    for _, sizes, lasted_s, _ in trial(rate_mbit):
        assert sizes == [1, 1, 1] + [factor * PIECE_BYTES // 4 for factor in factors]
        assert lasted_s < 0.5 + 2.1 * PIECE_BYTES * 8 / (rate_mbit * 1e6)


def test_a_busy_host_is_no_slow_link() -> None:
    """Half a millisecond in every piece would be 0.6 s in 1,221 pieces of 32 kB."""
    for found, _, _, _ in trial(10_000.0, holds_up_s=5e-4):
        assert found == pytest.approx(0.032, abs=0.003)


@pytest.mark.parametrize("at", [2, 4, 8, 9])
def test_one_stall_is_no_slow_link(at: int) -> None:
    for found, _, _, _ in trial(1000.0, stalls=at):
        assert found == pytest.approx(0.32, rel=0.02)


def test_small_model_sends_no_more_than_it_has() -> None:
    for _, sizes, _, _ in trial(100.0, nbytes=400):
        assert sizes == [1, 1, 1] + MOST_PIECES * [100]
