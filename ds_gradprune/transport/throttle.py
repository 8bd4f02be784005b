"""A slow link, emulated: wraps a transport and sleeps as long as the bytes would have taken.

For laptops and tests, where the real wire is memory. Every rank's link has the same rate in each
direction, so all ranks sleep equally and the emulation cannot make them disagree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ds_gradprune.errors import TransportTimeout
from ds_gradprune.stats import all_gather_bytes, ring_all_reduce_bytes
from ds_gradprune.transport.base import Transport


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
        timeout_s: a collective that would take longer raises `TransportTimeout` after so long.
        sleep: waits so many seconds; a virtual clock in tests.
    """

    def __init__(
        self,
        inner: Transport,
        schedule: Sequence[RatePoint],
        timeout_s: float = 600.0,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if not schedule or schedule[0].step != 0:
            raise ValueError("schedule must hold a point for step 0")
        self.rank = inner.rank
        self.world_size = inner.world_size
        self._inner = inner
        self._schedule = tuple(schedule)
        self._timeout_s = timeout_s
        self._sleep = sleep
        self._point = self._schedule[0]
        self._outage_s = self._point.outage_s

    def advance(self, step: int) -> None:
        """Optimizer step `step` begins: pick its point. Local.

        An outage waits for the next collective, which may come steps later.
        """
        point = [p for p in self._schedule if p.step <= step][-1]
        self._point = point
        if point.step == step:
            self._outage_s = point.outage_s
        self._inner.advance(step)

    def all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        """See `Transport.all_gather`. Collective."""
        self._inner.all_gather(payload, out)
        self._wait("all_gather", all_gather_bytes(payload.numel(), self.world_size))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """See `Transport.all_reduce`; costs what a ring would. Collective."""
        self._inner.all_reduce(tensor)
        tensor_bytes = tensor.numel() * tensor.element_size()
        self._wait("all_reduce", ring_all_reduce_bytes(tensor_bytes, self.world_size))

    def close(self) -> None:
        """See `Transport.close`. Local."""
        self._inner.close()

    def _wait(self, operation: str, wire_bytes: int) -> None:
        if self.world_size == 1:
            return
        point, outage_s = self._point, self._outage_s
        self._outage_s = 0.0
        wire_s = outage_s + point.latency_s + wire_bytes / point.rate_bytes_per_s
        if wire_s > self._timeout_s:
            self._sleep(self._timeout_s)
            raise TransportTimeout(
                f"{operation} of {wire_bytes} bytes had no answer within {self._timeout_s:g} s "
                f"(the emulated link needs {wire_s:.3g} s)"
            )
        self._sleep(wire_s)
