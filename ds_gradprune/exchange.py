"""Who sends which bytes to whom, and what that took.

`AllGather`: every rank hands its payload to every other. Exact, one latency; its traffic grows
with the number of ranks, so it is meant for up to 8 hosts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds_gradprune.stats import all_gather_bytes, ring_all_reduce_bytes
from ds_gradprune.transport.base import Transport


@dataclass(frozen=True, slots=True)
class Traffic:
    """What an exchange cost this rank since the last `take_traffic`.

    Attributes:
        comm_time_s: from first send to last receive, waiting for peers included, seconds.
        wire_bytes: bytes this rank sent to its peers.
    """

    comm_time_s: float = 0.0
    wire_bytes: int = 0


class AllGather:
    """All payloads to all ranks.

    Args:
        transport: this rank's end of the group.
        clock: seconds, monotonic; injected so that tests need no real time.
    """

    def __init__(
        self, transport: Transport, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.rank = transport.rank
        self.world_size = transport.world_size
        self._transport = transport
        self._clock = clock
        self._gathered = torch.empty(0, dtype=torch.uint8)
        self._traffic = Traffic()

    def gather(self, payload: torch.Tensor) -> torch.Tensor:
        """Exchange one payload.

        Args:
            payload: (payload_bytes,) uint8, CPU; equal size on all ranks.

        Returns:
            (world_size, payload_bytes) uint8, row r from rank r. A view of a buffer that the next
            call overwrites; it grows when needed and is kept.

        Raises:
            TransportError: the exchange failed.

        Collective: all ranks, same order.
        """
        total = self.world_size * payload.numel()
        if self._gathered.numel() < total:
            self._gathered = torch.empty(total, dtype=torch.uint8)
        out = self._gathered[:total].view(self.world_size, payload.numel())
        start_s = self._clock()
        self._transport.all_gather(payload, out)
        self._count(start_s, all_gather_bytes(payload.numel(), self.world_size))
        return out

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum `tensor` over ranks in place: the dense path.

        Raises:
            TransportError: the exchange failed.

        Collective: all ranks, same order.
        """
        _synchronize(tensor)
        start_s = self._clock()
        self._transport.all_reduce(tensor)
        _synchronize(tensor)
        tensor_bytes = tensor.numel() * tensor.element_size()
        self._count(start_s, ring_all_reduce_bytes(tensor_bytes, self.world_size))

    def advance(self, step: int) -> None:
        """Optimizer step `step` begins. Local."""
        self._transport.advance(step)

    def take_traffic(self) -> Traffic:
        """What has been exchanged since the last call. Local."""
        traffic, self._traffic = self._traffic, Traffic()
        return traffic

    def close(self) -> None:
        """Close the transport. Local."""
        self._transport.close()

    def _count(self, start_s: float, wire_bytes: int) -> None:
        done = self._traffic
        self._traffic = Traffic(
            done.comm_time_s + self._clock() - start_s, done.wire_bytes + wire_bytes
        )


def _synchronize(tensor: torch.Tensor) -> None:
    """Wait for the device, so that the clock sees the collective and not its launch."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
