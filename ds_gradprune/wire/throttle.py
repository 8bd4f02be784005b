"""A slow link, emulated: wraps a transport and lets a wait last as long as the bytes would take.

For laptops and tests, where the real wire is memory. Every rank's link has the same rate in each
direction, so all ranks wait equally and the emulation cannot make them disagree.

An emulated transfer begins at its start, or when the transfer before it has left the link. A wait
sleeps for what is left of it, so an exchange can be hidden behind computation. A peer that starts
late makes a rank wait for the real call, but not for the peer's emulated transfer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ds_gradprune.errors import TransportTimeout
from ds_gradprune.wire.traffic import all_gather_bytes, all_to_all_bytes, ring_all_reduce_bytes
from ds_gradprune.wire.transport import Call, Gate, Transport, Work


@dataclass(frozen=True, slots=True)
class RatePoint:
    """The link from optimizer step `step` on.

    Attributes:
        step: first optimizer step this point holds for.
        rate_bytes_per_s: each rank's link, each direction.
        latency_s: added once per collective, seconds.
        outage_s: the link is dead for so long when the point begins, seconds.
    """

    step: int
    rate_bytes_per_s: float
    latency_s: float = 0.0
    outage_s: float = 0.0


class ThrottledTransport(Transport):
    """`inner`, as slow as the schedule says.

    Args:
        inner: moves the bytes for real.
        schedule: points in order of step; the first must be for step 0.
        timeout_s: a wait that would last longer raises `TransportTimeout` after so long.
        sleep: waits so many seconds; None: for real.
        clock: seconds, monotonic, which `sleep` moves on; given together with it.
    """

    def __init__(
        self,
        inner: Transport,
        schedule: Sequence[RatePoint],
        timeout_s: float = 600.0,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if not schedule or schedule[0].step != 0:
            raise ValueError("schedule must hold a point for step 0")
        if (sleep is None) != (clock is None):
            raise ValueError("sleep and clock must be given together: both of one virtual clock")
        self.rank = inner.rank
        self.world_size = inner.world_size
        self._inner = inner
        self._schedule = tuple(schedule)
        self._timeout_s = timeout_s
        self._sleep = sleep or time.sleep
        self._clock = clock or time.monotonic
        self._gate = Gate("throttled")
        self._point = self._schedule[0]
        self._outage_s = self._point.outage_s
        self._free_s = 0.0

    def advance(self, step: int) -> None:
        """Optimizer step `step` begins: pick its point. Local.

        An outage waits for the next collective, which may come steps later.
        """
        point = [p for p in self._schedule if p.step <= step][-1]
        self._point = point
        if point.step == step:
            self._outage_s = point.outage_s
        self._inner.advance(step)

    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_gather`. Collective."""
        self._gate.check()
        work = self._inner.start_all_gather(payload, out)
        return self._started(work, "all_gather", all_gather_bytes(payload.numel(), self.world_size))

    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_to_all`. Collective."""
        self._gate.check()
        work = self._inner.start_all_to_all(send, out)
        row_bytes = send.numel() // self.world_size
        return self._started(work, "all_to_all", all_to_all_bytes(row_bytes, self.world_size))

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        """See `Transport.start_all_reduce`; costs what a ring would. Collective."""
        self._gate.check()
        work = self._inner.start_all_reduce(tensor)
        tensor_bytes = tensor.numel() * tensor.element_size()
        return self._started(
            work, "all_reduce", ring_all_reduce_bytes(tensor_bytes, self.world_size)
        )

    def close(self) -> None:
        """See `Transport.close`. Local."""
        self._gate.close()
        self._inner.close()

    def _started(self, work: Work, operation: str, wire_bytes: int) -> Work:
        """Put a transfer on the emulated link."""
        if self.world_size == 1:
            return work
        point, outage_s = self._point, self._outage_s
        self._outage_s = 0.0
        wire_s = outage_s + point.latency_s + wire_bytes / point.rate_bytes_per_s
        self._free_s = max(self._free_s, self._clock()) + wire_s
        what = f"{operation} of {wire_bytes} bytes"
        return _ThrottledCall(self, self._gate, work, self._free_s, what, wire_s)

    def sleep_until(self, end_s: float, what: str, wire_s: float) -> None:
        """Let emulated time pass.

        Args:
            end_s: until then, in the clock's seconds.
            what: is on the link.
            wire_s: how long the link needs for it, seconds.

        Raises:
            TransportTimeout: that is more than `timeout_s` away.
        """
        left_s = end_s - self._clock()
        if left_s > self._timeout_s:
            self._sleep(self._timeout_s)
            raise TransportTimeout(
                f"{what} on rank {self.rank} of {self.world_size} had no answer within "
                f"{self._timeout_s:g} s (the emulated link needs {wire_s:.3g} s)"
            )
        if left_s > 0.0:
            self._sleep(left_s)

    def has_passed(self, end_s: float) -> bool:
        """Whether the clock shows `end_s` or later."""
        return self._clock() >= end_s


class _ThrottledCall(Call):
    """A call of the inner transport that ends no sooner than the emulated link lets it.

    Args:
        link: the transport.
        gate: of the transport.
        work: the call of the inner transport.
        end_s: when the emulated link has carried it, in the clock's seconds.
        what: is on the link.
        wire_s: how long the link needs for it, seconds.
    """

    def __init__(
        self,
        link: ThrottledTransport,
        gate: Gate,
        work: Work,
        end_s: float,
        what: str,
        wire_s: float,
    ) -> None:
        super().__init__(gate)
        self._link = link
        self._work = work
        self._end_s = end_s
        self._what = what
        self._wire_s = wire_s

    def _finish(self) -> None:
        self._work.wait()
        self._link.sleep_until(self._end_s, self._what, self._wire_s)

    def _has_ended(self) -> bool:
        return self._link.has_passed(self._end_s) and self._work.done()
