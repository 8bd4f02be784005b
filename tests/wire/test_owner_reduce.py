"""Owners sum shares: equal on all ranks, nothing lost, staged until applied, traffic flat in N.

Longer than 300 lines: one exchange, from its sums to its faults.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from ds_gradprune import codec
from ds_gradprune.bucket.layout import lay_out
from ds_gradprune.errors import (
    CheckpointError,
    RankMismatchError,
    TransportTimeout,
    UnsupportedError,
    WireFormatError,
)
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.channel import Channel
from ds_gradprune.wire.owner_reduce import OwnerReduce
from ds_gradprune.wire.throttle import RatePoint, ThrottledTransport
from ds_gradprune.wire.transport import Transport
from tests.helpers.buckets import bits
from tests.helpers.ranks import VirtualClock, run_processes, run_ranks
from tests.helpers.wire import LAYOUTS, SIGNALS, announcement_of, begin, exchanged, vector_of


def owed(channel: OwnerReduce, bucket: int) -> torch.Tensor:
    """What this rank owes of a bucket, where it belongs in the bucket."""
    vector = torch.zeros(LAYOUTS[bucket].numel)
    channel.pay(bucket, LAYOUTS[bucket], vector)
    channel.settle(applied=False)
    return vector


@pytest.mark.parametrize("value_bits", [2, 4, 16, 32])
@pytest.mark.parametrize("world_size", [3, 8, 16])
def test_equal_on_all_ranks_and_nothing_is_lost(world_size: int, value_bits: int) -> None:
    """All that was put in is delivered or owed; sums and residuals have equal bits everywhere."""

    def work(transport: Transport) -> Any:
        channel = OwnerReduce(transport)
        seen = []
        for step in range(3):
            vectors = [vector_of(transport.rank, b, step) for b in range(len(LAYOUTS))]
            done = exchanged(channel, vectors, value_bits=value_bits)
            seen.append((done, [owed(channel, b) for b in range(len(LAYOUTS))]))
        return seen

    ranks = run_ranks(world_size, work)
    for bucket, layout in enumerate(LAYOUTS):
        kept = torch.zeros(layout.numel, dtype=torch.float64)
        for step in range(3):
            delivered = ranks[0][step][0][bucket][0]
            for rank in ranks[1:]:
                assert torch.equal(bits(rank[step][0][bucket][0]), bits(delivered))
            put_in = sum(rank[step][0][bucket][1].double() for rank in ranks)
            left = sum(rank[step][1][bucket].double() for rank in ranks)
            if value_bits == 32:  # on the grid: not even a sum is rounded
                assert torch.equal(put_in + kept, delivered.double() + left)
            else:
                # Rounded sums alone: world_size + 2 additions of numbers below 2^11.
                bound = (world_size + 2) * 2.0**-14
                torch.testing.assert_close(
                    put_in + kept, delivered.double() + left, rtol=0, atol=bound
                )
            kept = left
        assert layout.pruned_numel < 4096 or float(kept.abs().max()) > 0  # owners had to keep some


def test_what_is_not_pruned_is_the_sum_of_all_gather() -> None:
    """At k = 4096 and 32 bits nothing is kept back, whoever adds."""

    def work(transport: Transport) -> Any:
        vectors = [vector_of(transport.rank, b, 0) for b in range(len(LAYOUTS))]
        owners, everybody = OwnerReduce(transport), AllGather(transport)
        return exchanged(owners, vectors, k=4096), exchanged(everybody, vectors, k=4096)

    for by_owners, by_all in run_ranks(4, work):
        for (summed, put_in), (gathered, put_in_too) in zip(by_owners, by_all, strict=True):
            assert torch.equal(bits(summed), bits(gathered))
            assert torch.equal(bits(put_in), bits(put_in_too))


@pytest.mark.distributed
def test_over_gloo_the_bits_are_those_of_threads() -> None:
    def work(transport: Transport) -> Any:
        channel = OwnerReduce(transport)
        return [
            exchanged(channel, [vector_of(transport.rank, b, step) for b in range(len(LAYOUTS))])
            for step in range(2)
        ]

    threads = run_ranks(3, work)
    for rank, found in enumerate(run_processes(3, "tests.helpers.process_main", "owned_sums")):
        for (step, of_threads), of_processes in zip(enumerate(threads[rank]), found, strict=True):
            for one, other in zip(of_threads, of_processes, strict=True):
                assert torch.equal(bits(one[0]), bits(other[0])), f"step {step}"


def test_residual_goes_out_later() -> None:
    """Zeros after the first exchange: what owners kept arrives, until they owe nothing."""

    def work(transport: Transport) -> None:
        channel = OwnerReduce(transport)
        arrived = torch.zeros(LAYOUTS[0].numel)
        put_in = torch.zeros(LAYOUTS[0].numel)
        for step in range(8):
            factor = 1.0 if step == 0 else 0.0
            vectors = [vector_of(transport.rank, b, 0) * factor for b in range(len(LAYOUTS))]
            delivered, sent = exchanged(channel, vectors)[0]
            arrived += delivered
            put_in += sent
        transport.all_reduce(put_in)
        assert torch.equal(arrived, put_in)
        assert not bool(owed(channel, 0).any())

    run_ranks(3, work)


def test_without_error_feedback_owners_keep_nothing() -> None:
    def work(transport: Transport) -> int:
        channel = OwnerReduce(transport, error_feedback=False)
        exchanged(channel, [vector_of(transport.rank, b, 0) for b in range(len(LAYOUTS))])
        return channel.residuals.nbytes

    assert run_ranks(3, work) == [0] * 3


# --- staging --------------------------------------------------------------------------------------


def test_an_exchange_that_is_not_applied_changes_no_residual() -> None:
    def work(transport: Transport) -> None:
        channel = OwnerReduce(transport)
        vectors = [vector_of(transport.rank, b, 0) for b in range(len(LAYOUTS))]
        exchanged(channel, vectors)
        before = owed(channel, 0)
        payloads = []
        for applied in (False, True):
            pending = begin(channel, vectors)
            pending.wait()
            assert torch.equal(owed(channel, 0), before)
            payloads.append([p.clone() for p in pending.payloads(0)])
            pending.finish(applied=applied)
        assert all(map(torch.equal, *payloads))  # the second is the first, made again
        assert not torch.equal(owed(channel, 0), before)

    run_ranks(3, work)


def test_one_bad_rank_is_told_by_every_owner_and_touches_no_residual() -> None:
    def work(transport: Transport) -> None:
        channel = OwnerReduce(transport)
        vectors = [vector_of(transport.rank, b, 0) for b in range(len(LAYOUTS))]
        exchanged(channel, vectors)
        before = owed(channel, 0)
        bad = transport.rank == 1
        vectors[0][7] = float("inf") if bad else 0.0
        signals = dataclasses.replace(SIGNALS, nonfinite=bad)
        pending = begin(channel, vectors, signals=signals)
        pending.wait()
        flags = [codec.read_header(p).signals.nonfinite for p in pending.payloads(0)]
        pending.finish(applied=True)  # even so
        assert flags == [True] * 3
        assert torch.equal(owed(channel, 0), before)

    run_ranks(3, work)


def test_a_sum_that_overflows_is_told() -> None:
    def work(transport: Transport) -> list[bool]:
        channel = OwnerReduce(transport)
        vectors = [torch.zeros(layout.numel) for layout in LAYOUTS]
        vectors[0][3] = 3e38
        pending = begin(channel, vectors)
        pending.wait()
        return [codec.read_header(p).signals.nonfinite for p in pending.payloads(0)]

    assert run_ranks(3, work) == [[True, False, False]] * 3


def test_two_exchanges_of_other_buckets_may_be_under_way() -> None:
    """As the buckets of a step, each in its own exchange, all applied at its end."""

    def work(transport: Transport) -> None:
        channel = OwnerReduce(transport)
        layouts = [LAYOUTS[0]]
        pending = [
            begin(channel, [vector_of(transport.rank, 0, n)], layouts=layouts, bucket=n)
            for n in range(2)
        ]
        for one in pending:
            one.wait()
        again = begin(channel, [vector_of(transport.rank, 0, 2)], layouts=layouts, bucket=1)
        with pytest.raises(ValueError, match="bucket 1 is in an exchange that is not finished yet"):
            again.wait()
        for one in pending:
            one.finish(applied=True)
        assert (
            channel.residuals.nbytes
            == 2 * 4 * channel.shares(LAYOUTS[0])[transport.rank].layout.numel
        )

    run_ranks(2, work)


def test_a_dense_sum_pays_what_owners_owe() -> None:
    def work(transport: Transport) -> None:
        channel = OwnerReduce(transport)
        vectors = [vector_of(transport.rank, b, 0) for b in range(len(LAYOUTS))]
        delivered, sent = exchanged(channel, vectors)[0]
        for applied in (False, True):
            rest = vectors[0] - sent
            channel.pay(0, LAYOUTS[0], rest)
            channel.start_all_reduce(rest).wait()
            channel.settle(applied=applied)
            total = vectors[0].clone()
            transport.all_reduce(total)
            assert torch.equal(delivered + rest, total)  # on the grid: exact
        assert not bool(owed(channel, 0).any())

    run_ranks(3, work)


def test_a_dense_sum_is_paid_in_the_units_of_the_loss_scale() -> None:
    def work(transport: Transport) -> None:
        channel = OwnerReduce(transport)
        exchanged(channel, [vector_of(transport.rank, b, 0) for b in range(len(LAYOUTS))])
        vector = torch.zeros(LAYOUTS[0].numel, dtype=torch.float64)
        channel.pay(0, LAYOUTS[0], vector, scale=8.0)
        assert torch.equal(vector, 8.0 * owed(channel, 0).double())
        assert bool(vector.any())

    run_ranks(2, work)


# --- state ----------------------------------------------------------------------------------------


def test_a_restart_continues_with_the_same_bits() -> None:
    def work(transport: Transport) -> None:
        def vectors(step: int) -> list[torch.Tensor]:
            return [vector_of(transport.rank, b, step) for b in range(len(LAYOUTS))]

        channel, restarted = OwnerReduce(transport), OwnerReduce(transport)
        exchanged(channel, vectors(0))
        restarted.load_state_dict(channel.state_dict())
        for (one, _), (other, _) in zip(
            exchanged(channel, vectors(1)), exchanged(restarted, vectors(1)), strict=True
        ):
            assert torch.equal(bits(one), bits(other))

    run_ranks(3, work)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("format", 2, "owned residual's format must be 1, got 2"),
        ("world_size", 3, "owned residual's world_size must be 2, got 3"),
        ("rank", 7, r"owned residual's rank must be \d, got 7"),
    ],
)
def test_a_foreign_state_is_refused(key: str, value: int, match: str) -> None:
    def work(transport: Transport) -> None:
        channel = OwnerReduce(transport)
        exchanged(channel, [vector_of(transport.rank, b, 0) for b in range(len(LAYOUTS))])
        before = channel.residuals.nbytes
        with pytest.raises(CheckpointError, match=match):
            channel.load_state_dict(OwnerReduce(transport).state_dict() | {key: value})
        assert channel.residuals.nbytes == before > 0
        with pytest.raises(CheckpointError, match="this run exchanges with all_gather"):
            AllGather(transport).load_state_dict(channel.state_dict())
        assert AllGather(transport).state_dict() == {}
        channel.load_state_dict({})  # as before the first exchange, or after one with all_gather
        assert channel.residuals.nbytes == 0

    run_ranks(2, work)


def test_another_layout_is_refused() -> None:
    def work(transport: Transport) -> None:
        channel = OwnerReduce(transport)
        exchanged(channel, [vector_of(transport.rank, b, 0) for b in range(len(LAYOUTS))])
        other = lay_out([3 * 4096], [True])
        pending = begin(channel, [torch.ones(other.numel)], layouts=[other])
        with pytest.raises(UnsupportedError, match="bucket 0 has another layout than in the"):
            pending.wait()

    run_ranks(2, work)


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"step": 2}, r"step is \d on rank \d and \d on rank \d"),
        ({"bucket": 5}, r"bucket is \d on rank \d and \d on rank \d"),
        ({"rank": 1}, "a payload of rank 1 came from the place of rank 0"),
    ],
)
def test_payloads_of_another_exchange_are_refused(header: dict[str, int], match: str) -> None:
    def work(transport: Transport) -> None:
        channel = OwnerReduce(transport)
        vectors = [vector_of(transport.rank, b, 0) for b in range(len(LAYOUTS))]
        pending = begin(channel, vectors, **(header if transport.rank == 0 else {}))
        with pytest.raises(RankMismatchError, match=match):
            pending.wait()
        pending.finish(applied=False)
        assert channel.memory.nbytes == 0

    run_ranks(2, work)


class _Flips(Transport):
    """Damages a byte of what rank 0 receives in an all-to-all."""

    def __init__(self, inner: Transport) -> None:
        self.rank, self.world_size, self._inner = inner.rank, inner.world_size, inner

    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Any:
        return self._inner.start_all_gather(payload, out)

    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Any:
        work = self._inner.start_all_to_all(send, out)
        work.wait()
        if self.rank == 0:
            out[1, 100] ^= 1
        return work

    def start_all_reduce(self, tensor: torch.Tensor) -> Any:
        return self._inner.start_all_reduce(tensor)

    def close(self) -> None:
        self._inner.close()


def test_a_damaged_share_is_found_by_its_owner() -> None:
    """The others get no sums and hear of it by a time-out; nobody's residual has changed."""

    def work(transport: Transport) -> None:
        channel = OwnerReduce(_Flips(transport))
        pending = begin(channel, [vector_of(transport.rank, b, 0) for b in range(len(LAYOUTS))])
        error, match = (
            (WireFormatError, "crc32c")
            if transport.rank == 0
            else (TransportTimeout, "no answer from rank 0")
        )
        with pytest.raises(error, match=match):
            pending.wait()
        pending.finish(applied=False)
        assert channel.residuals.nbytes == 0

    run_ranks(2, work, timeout_s=0.2)


# --- traffic and memory ---------------------------------------------------------------------------


def test_traffic_of_a_rank_is_flat_in_the_number_of_ranks() -> None:
    layout = lay_out([320 * 4096], [True])

    def sent(kind: type[Channel], world_size: int) -> int:
        def work(transport: Transport) -> int:
            channel = kind(transport)
            pending = begin(channel, [torch.ones(layout.numel)], k=41, layouts=[layout])
            pending.wait()
            return channel.take_wire_bytes()

        (taken,) = set(run_ranks(world_size, work))
        return int(taken)

    one = codec.codec_for(41, 32).payload_bytes(layout, 41)
    for world_size in (2, 8, 16):
        ideal = 2 * one * (world_size - 1) / world_size
        assert ideal <= sent(OwnerReduce, world_size) <= 1.05 * ideal
        assert sent(AllGather, world_size) == one * (world_size - 1)


def test_both_halves_can_be_hidden() -> None:
    """At 1 kB/s each half of the exchange needs its bytes' time, and computation hides it."""

    def work(inner: Transport) -> tuple[float, float, float]:
        clock = VirtualClock(tick_s=0.0)
        channel = OwnerReduce(
            ThrottledTransport(inner, [RatePoint(0, 1000.0)], 600.0, clock.sleep, clock.now_s)
        )
        pending = begin(channel, [vector_of(inner.rank, b, 0) for b in range(len(LAYOUTS))])
        half_s = channel.take_wire_bytes() / 1000.0
        assert not pending.done()
        clock.sleep(half_s)
        start_s = clock.now_s()
        pending.proceed()
        pending.proceed()
        first_s = clock.now_s() - start_s
        clock.sleep(half_s - 0.125)
        start_s = clock.now_s()
        pending.wait()
        return first_s, clock.now_s() - start_s, channel.take_wire_bytes() / 1000.0 - half_s

    for first_s, second_s, difference_s in run_ranks(3, work):
        assert first_s == pytest.approx(0.0, abs=1e-5)
        assert second_s == pytest.approx(0.125, abs=1e-5)
        assert difference_s == 0.0


def test_memory_is_used_again() -> None:
    def work(transport: Transport) -> None:
        channel = OwnerReduce(transport)
        vectors = [vector_of(transport.rank, b, 0) for b in range(len(LAYOUTS))]
        exchanged(channel, vectors)
        held = channel.memory.nbytes
        exchanged(channel, vectors)
        assert channel.memory.nbytes == held > 0

    run_ranks(2, work)


def test_an_announcement_is_that_of_every_channel() -> None:
    def work(transport: Transport) -> list[int]:
        channel = OwnerReduce(transport)
        return [h.rank for h in channel.announce(announcement_of(transport.rank)).headers()]

    assert run_ranks(2, work) == [[0, 1]] * 2
