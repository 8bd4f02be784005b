"""Announcements agree or say what differs; messages go round; bytes and memory are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_gradprune import codec
from ds_gradprune.bucket.layout import lay_out
from ds_gradprune.errors import RankMismatchError, TransportTimeout, WireFormatError
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.memory import Memory
from ds_gradprune.wire.throttle import RatePoint, ThrottledTransport
from ds_gradprune.wire.transport import Transport
from tests.helpers.ranks import VirtualClock, run_processes, run_ranks
from tests.helpers.wire import announcement_of, filled

LAYOUTS = [lay_out([64], [True]) for _ in range(3)]
SIZES = [3, 5, 2]


# --- announcements --------------------------------------------------------------------------------


def test_headers_of_all_ranks_arrive_in_rank_order() -> None:
    def work(transport: Transport) -> Any:
        announcement = AllGather(transport).announce(
            announcement_of(transport.rank, loss=float(transport.rank)), SIZES
        )
        assert announcement.headers() is announcement.headers()
        return [(h.rank, h.step, h.k, h.signals.loss) for h in announcement.headers()]

    expected = [(rank, 3, 41, float(rank)) for rank in range(3)]
    assert run_ranks(3, work) == [expected] * 3


@pytest.mark.parametrize(
    ("odd", "sizes", "match"),
    [
        ({"step": 4}, SIZES, "step is 4 on rank 1 and 3 on rank 0"),
        ({"k": 42}, SIZES, r"k is 42 on rank 1 and 41 on rank 0.*rank 2: step 3, k 41 of 4096"),
        ({"agreement": 0xAB}, SIZES, "history is 000000ab on rank 1 and 00000007 on rank 0"),
        ({"k": 42, "agreement": 8}, SIZES, "k is 42 on rank 1"),
        ({}, [3, 5], "number of payloads is 2 on rank 1 and 3 on rank 0"),
        ({}, [3, 5, 3], "bytes of the message is 11 on rank 1 and 10 on rank 0"),
        ({}, [3, 4, 3], "crc of the payload sizes is [0-9a-f]{8} on rank 1 and"),
    ],
)
def test_the_first_difference_is_named_on_every_rank(
    odd: dict[str, Any], sizes: list[int], match: str
) -> None:
    def work(transport: Transport) -> str:
        is_odd = transport.rank == 1
        header = announcement_of(transport.rank, **(odd if is_odd else {}))
        announcement = AllGather(transport).announce(header, sizes if is_odd else SIZES)
        with pytest.raises(RankMismatchError, match=match) as caught:
            announcement.headers()
        assert "ranks no longer agree on their decisions or parameters" in str(caught.value)
        return str(caught.value)

    assert len(set(run_ranks(3, work))) == 1


def test_a_rank_in_anothers_place_is_named() -> None:
    def work(transport: Transport) -> None:
        announcement = AllGather(transport).announce(announcement_of(0))
        with pytest.raises(RankMismatchError, match="rank 0 sits in the place of rank 1"):
            announcement.headers()

    run_ranks(2, work)


def test_a_damaged_header_is_told_with_its_rank() -> None:
    def work(transport: Transport) -> None:
        header = announcement_of(transport.rank)
        header[30] ^= transport.rank
        announcement = AllGather(transport).announce(header)
        with pytest.raises(WireFormatError, match=r"announcement of rank 1 cannot be read.*crc32c"):
            announcement.headers()

    run_ranks(2, work)


def test_an_announcement_is_a_header() -> None:
    def work(transport: Transport) -> None:
        with pytest.raises(ValueError, match=r"header must be uint8 of shape \(64,\)"):
            AllGather(transport).announce(torch.zeros(65, dtype=torch.uint8))

    run_ranks(1, work)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("what", "match"), [("k", "k is 42 on rank 1 and 41"), ("sizes", "bytes of the message is 220")]
)
def test_over_gloo_a_rank_that_decides_otherwise_is_told_and_ends_nothing(
    what: str, match: str
) -> None:
    for told, again in run_processes(
        2, "tests.helpers.process_main", "channel_disagrees", {"what": what}
    ):
        assert told.startswith("RankMismatchError: ranks no longer agree on their decisions")
        assert match in told
        assert again == "[0, 1]"


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("most_bytes", [1, 5, 8, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_payloads_of_every_bucket_in_rank_order(world_size: int, most_bytes: int) -> None:
    """However many collectives the message travels in."""

    def work(transport: Transport) -> None:
        channel = AllGather(transport, most_bytes)
        pending = channel.start(filled(transport.rank, SIZES), SIZES, LAYOUTS)
        pending.proceed()
        pending.wait()
        assert pending.done()
        for bucket, size in enumerate(SIZES):
            rows = [payload.tolist() for payload in pending.payloads(bucket)]
            assert rows == [[10 * rank + bucket] * size for rank in range(world_size)]
            assert all(payload.is_contiguous() for payload in pending.payloads(bucket))
            assert [p.tolist() for p in pending.sent(bucket)] == [rows[transport.rank]]
        assert [share.layout for share in channel.shares(LAYOUTS[0])] == [LAYOUTS[0]]
        pending.finish(applied=True)

    run_ranks(world_size, work)


def test_nothing_to_send_is_an_exchange_too() -> None:
    def work(transport: Transport) -> None:
        pending = AllGather(transport).start(torch.empty(0, dtype=torch.uint8), [], [])
        pending.wait()
        pending.finish(applied=True)

    run_ranks(2, work)


def test_receive_memory_comes_back_with_finish_only() -> None:
    def work(transport: Transport) -> None:
        channel = AllGather(transport)

        def exchange(finish: bool) -> int:
            pending = channel.start(filled(transport.rank, SIZES), SIZES, LAYOUTS)
            pending.wait()
            address = pending.payloads(0)[0].data_ptr()
            kept.append(pending)
            if finish:
                pending.finish(applied=False)
                pending.finish(applied=False)  # a second one gives nothing back again
                with pytest.raises(ValueError, match="must have been waited for, and not be fini"):
                    pending.payloads(0)
            return address

        kept: list[Any] = []
        first = exchange(finish=True)
        assert exchange(finish=True) == first
        assert exchange(finish=False) == first
        assert exchange(finish=True) != first  # the payloads of the one before are still looked at

    run_ranks(2, work)


def test_an_exchange_that_failed_gives_no_memory_back() -> None:
    def work(transport: Transport) -> None:
        if transport.rank == 1:
            return
        pending = AllGather(transport).start(filled(0, SIZES), SIZES, LAYOUTS)
        with pytest.raises(TransportTimeout, match="no answer from rank 1"):
            pending.wait()
        with pytest.raises(ValueError, match="waited for before it can be applied"):
            pending.finish(applied=True)
        pending.finish(applied=False)
        assert pending._pool.nbytes == 0
        with pytest.raises(ValueError, match="must have been waited for"):
            pending.payloads(0)

    run_ranks(2, work, timeout_s=0.05)


def test_memory_is_used_again_unless_it_is_far_too_large() -> None:
    memory = Memory()
    large = memory.take(1000)
    memory.give(large)
    assert memory.take(250) is large
    memory.give(large)
    assert memory.take(249) is not large
    assert memory.nbytes == 0
    memory.give(large)
    assert memory.take(1001).numel() == 1001


def test_a_message_is_checked() -> None:
    def work(transport: Transport) -> None:
        channel = AllGather(transport)
        message = filled(0, SIZES)
        with pytest.raises(ValueError, match=r"message must be uint8 of shape \(10,\)"):
            channel.start(message[1:], SIZES, LAYOUTS)
        with pytest.raises(ValueError, match="one entry for each of the 2 shares of all buckets"):
            channel.start(message, SIZES, LAYOUTS[:2])
        channel.announce(announcement_of(0), [4, 4, 2]).headers()
        with pytest.raises(ValueError, match="those that were announced: 3 payloads of 10 bytes"):
            channel.start(message, SIZES, LAYOUTS)
        channel.announce(announcement_of(0), SIZES).headers()
        channel.start(message, SIZES, LAYOUTS).wait()
        channel.start(message, SIZES, LAYOUTS).wait()  # announced once, compared once

    run_ranks(1, work)


# --- traffic --------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_link_and_its_time_can_be_hidden() -> None:
    def work(inner: Transport) -> list[float]:
        clock = VirtualClock(tick_s=0.0)
        points = [RatePoint(0, 1000.0)]
        channel = AllGather(ThrottledTransport(inner, points, 60.0, clock.sleep, clock.now_s))
        taken = []
        channel.announce(announcement_of(inner.rank)).headers()
        taken.append(channel.take_wire_bytes())
        sizes = [200, 300]
        pending = channel.start(filled(inner.rank, sizes), sizes, LAYOUTS[:2])
        taken.append(channel.take_wire_bytes())
        clock.sleep(0.75)  # of one second on the link
        start_s = clock.now_s()
        pending.wait()
        taken.append(clock.now_s() - start_s)
        channel.start_all_reduce(torch.zeros(300)).wait()  # 1,200 bytes: a ring sends 2 * 2/3
        return [*taken, channel.take_wire_bytes(), channel.take_wire_bytes()]

    row_bytes = codec.HEADER_BYTES + 16
    assert run_ranks(3, work) == [[2 * row_bytes, 1000, 0.25, 1600, 0]] * 3


def test_alone_nothing_crosses_a_wire() -> None:
    def work(transport: Transport) -> int:
        channel = AllGather(transport)
        channel.announce(announcement_of(0), SIZES).headers()
        channel.start(filled(0, SIZES), SIZES, LAYOUTS).wait()
        channel.start_all_reduce(torch.zeros(64)).wait()
        channel.advance(3)
        channel.close()
        return channel.take_wire_bytes()

    assert run_ranks(1, work) == [0]
