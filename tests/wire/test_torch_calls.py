"""What a call over torch.distributed makes of time-outs and errors, with works of our own."""

from __future__ import annotations

import datetime
import re
from typing import Any

import pytest
import torch

from ds_gradprune.errors import TransportError, TransportTimeout
from ds_gradprune.wire import torchdist
from ds_gradprune.wire.torchdist import _TorchCall
from ds_gradprune.wire.transport import Gate
from tests.helpers.ranks import VirtualClock


class FakeWork:
    """Ends after so many seconds of a virtual clock, or with what torch would raise."""

    def __init__(self, clock: VirtualClock, needs_s: float, raises: str | None = None) -> None:
        self.clock, self.end_s, self.raises = clock, needs_s, raises
        self.limits_s: list[float] = []

    def is_completed(self) -> bool:
        return self.clock.now_s() >= self.end_s

    def wait(self, limit: datetime.timedelta | None = None) -> None:
        limit_s = 0.0 if limit is None else limit.total_seconds()
        self.limits_s.append(limit_s)
        left_s = self.end_s - self.clock.now_s()
        self.clock.sleep(max(0.0, min(left_s, limit_s)))
        if left_s > limit_s:
            raise RuntimeError("Operation timed out!")
        if self.raises is not None:
            raise RuntimeError(self.raises)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    virtual = VirtualClock(tick_s=0.0)
    monkeypatch.setattr(torchdist.time, "monotonic", virtual.now_s)
    monkeypatch.setattr(torchdist.time, "sleep", virtual.sleep)
    return virtual


def call_of(works: list[FakeWork], polls: bool = False, arrivals: Any = ()) -> _TorchCall:
    call = _TorchCall(Gate("torch"), "all_gather", (0, 2), 10.0, arrivals, polls)
    call.works += works
    return call


def test_all_pieces_share_one_deadline_counted_from_the_wait(clock: VirtualClock) -> None:
    call = call_of([FakeWork(clock, needs_s) for needs_s in (104.0, 108.0, 112.0)])
    pieces = list(call.works)
    clock.sleep(100.0)  # hidden behind computation
    with pytest.raises(TransportTimeout, match="no answer from rank 1 within 10 s"):
        call.wait()
    assert [work.limits_s for work in pieces] == [[10.0], [6.0], [2.0]]
    assert clock.now_s() == 110.0


def test_a_piece_that_has_ended_needs_no_time(clock: VirtualClock) -> None:
    """torch takes a limit of 0 for none, so it is never handed one."""
    late, ended = FakeWork(clock, 10.0), FakeWork(clock, 1.0)
    call_of([late, ended]).wait()
    assert ended.limits_s == [0.001]


@pytest.mark.parametrize("needs_s", [0.5, 50.0])
def test_works_that_cannot_time_out_are_looked_at(clock: VirtualClock, needs_s: float) -> None:
    call = call_of([FakeWork(clock, needs_s)], polls=True)
    if needs_s < 10.0:
        call.wait()
        assert clock.now_s() == pytest.approx(needs_s, abs=1e-3)
        return
    with pytest.raises(TransportTimeout, match="no answer from rank 1 within 10 s"):
        call.wait()
    assert clock.now_s() == pytest.approx(10.0, abs=1e-3)


def test_what_arrived_elsewhere_is_copied_in_the_end(clock: VirtualClock) -> None:
    target, source = torch.zeros(3), torch.ones(3)
    call = call_of([FakeWork(clock, 1.0)], arrivals=[(target, source)])
    assert not call.done()
    assert not bool(target.any())
    call.wait()
    assert torch.equal(target, source)
    assert call.done()


def test_a_failed_call_copies_nothing(clock: VirtualClock) -> None:
    target = torch.zeros(3)
    works = [FakeWork(clock, 1.0), FakeWork(clock, 99.0)]
    call = call_of(works, arrivals=[(target, torch.ones(3))])
    for _ in range(2):
        with pytest.raises(TransportTimeout, match="all_gather on rank 0 of 2"):
            call.wait()
    assert not bool(target.any())
    assert call.done()


CLOSED = (
    "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[10.0.0.2]:55215. This is typically caused by a remote worker crashing. Check the logs of the "
    "remote worker before reporting an error. GLHF! \N{BEACH WITH UMBRELLA}"
)


@pytest.mark.parametrize(
    ("raised", "error", "told"),
    [
        (
            CLOSED,
            TransportError,
            "all_gather on rank 0 of 2 failed: rank 1 (at 10.0.0.2) has closed the connection. Its "
            "process has ended or its host is gone: look for the last lines of its output",
        ),
        (
            "[pair.cc:1] Read error [fe80::1]:7: Connection reset by peer",
            TransportError,
            "all_gather on rank 0 of 2 failed: rank 1 (at fe80::1) has closed the connection. Its "
            "process has ended or its host is gone: look for the last lines of its output",
        ),
        (
            "[/gloo/unbound_buffer.cc:129] Timed out waiting 2000ms for send operation to complete",
            TransportTimeout,
            "all_gather on rank 0 of 2 had no answer from rank 1 within 2 s. Usual causes: ",
        ),
        (
            "Application timeout caused pair closure",
            TransportTimeout,
            "all_gather on rank 0 of 2 had no answer from rank 1 within 10 s. Usual causes: ",
        ),
        (
            "[enforce fail at x.cc:10] no such device.\nException raised from f at y.cpp:3\n#0: g",
            TransportError,
            "all_gather on rank 0 of 2 failed: no such device",
        ),
        ("", TransportError, "all_gather on rank 0 of 2 failed: torch gave no reason"),
    ],
)
def test_what_torch_raises_is_told_in_a_clean_sentence(
    clock: VirtualClock, raised: str, error: type[TransportError], told: str
) -> None:
    call = call_of([FakeWork(clock, 0.0, raised)])
    with pytest.raises(TransportError, match=re.escape(told)) as caught:
        call.wait()
    assert type(caught.value) is error
    assert error is TransportTimeout or str(caught.value) == told
    assert str(caught.value).isascii()


def test_the_transport_needs_a_process_group() -> None:
    with pytest.raises(TransportError, match=r"torch\.distributed must be initialised before"):
        torchdist.TorchDistTransport()
