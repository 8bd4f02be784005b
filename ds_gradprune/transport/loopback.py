"""N ranks as threads of one process: for tests and for laboratories on one machine."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from ds_gradprune.errors import RankMismatchError, TransportError, TransportTimeout
from ds_gradprune.transport.base import Transport


@dataclass(frozen=True, slots=True)
class _Call:
    """What one rank brings to a collective."""

    operation: str
    tensor: torch.Tensor


class LoopbackHub:
    """The meeting point of `world_size` threads.

    Args:
        world_size: number of ranks, >= 1.
        timeout_s: a rank that waits longer for its peers gets `TransportTimeout`, seconds.
    """

    def __init__(self, world_size: int, timeout_s: float = 60.0) -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        self.world_size = world_size
        self.timeout_s = timeout_s
        self._calls: list[_Call | None] = [None] * world_size
        self._barrier = threading.Barrier(world_size)

    def transport(self, rank: int) -> LoopbackTransport:
        """The end of `rank`; one thread uses it."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), got {rank}")
        return LoopbackTransport(self, rank)

    def meet(self, rank: int, call: _Call) -> list[_Call]:
        """Deposit `call`, wait for everyone's, return them in rank order."""
        self._calls[rank] = call
        self.wait(call.operation)
        calls = [c for c in self._calls if c is not None]
        kinds = [(c.operation, tuple(c.tensor.shape), c.tensor.dtype) for c in calls]
        if any(kind != kinds[0] for kind in kinds):
            listed = "; ".join(f"rank {r}: {kind[0]} {kind[1]}" for r, kind in enumerate(kinds))
            raise RankMismatchError(
                f"ranks must make the same call with the same size, got {listed}"
            )
        return calls

    def wait(self, operation: str) -> None:
        """Return when every rank has come; the barrier keeps the ranks in step."""
        try:
            self._barrier.wait(self.timeout_s)
        except threading.BrokenBarrierError as exc:
            raise TransportTimeout(
                f"{operation} had no answer from every rank within {self.timeout_s:g} s"
            ) from exc

    def abort(self) -> None:
        """Wake everyone who waits, with an error: a rank is gone."""
        self._barrier.abort()


class LoopbackTransport(Transport):
    """One thread's end of a `LoopbackHub`."""

    def __init__(self, hub: LoopbackHub, rank: int) -> None:
        self.rank = rank
        self.world_size = hub.world_size
        self._hub = hub
        self._closed = False

    def all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        """See `Transport.all_gather`. Collective."""
        self._check_open()
        for row, call in zip(
            out, self._hub.meet(self.rank, _Call("all_gather", payload)), strict=True
        ):
            row.copy_(call.tensor)
        self._hub.wait("all_gather")  # nobody reuses its payload before all have read it

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """See `Transport.all_reduce`; adds in rank order. Collective."""
        self._check_open()
        calls = self._hub.meet(self.rank, _Call("all_reduce", tensor))
        total = calls[0].tensor.clone()
        for call in calls[1:]:
            total.add_(call.tensor)
        self._hub.wait("all_reduce")
        tensor.copy_(total)

    def close(self) -> None:
        """See `Transport.close`. Local."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the loopback transport is closed")
