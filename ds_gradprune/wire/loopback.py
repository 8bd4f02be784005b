"""N ranks as threads of one process: for tests and for laboratories on one machine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ds_gradprune.errors import RankMismatchError, TransportError, TransportTimeout
from ds_gradprune.wire.transport import (
    Call,
    Gate,
    Transport,
    Work,
    check_all_gather,
    check_all_reduce,
    check_all_to_all,
)

Delay = Callable[[str, int, int], object]
"""operation, rank, number of the call on this rank, from 0."""


@dataclass(slots=True)
class _Meeting:
    """One collective: what the ranks have brought, and how many have taken theirs.

    Attributes:
        brought: operation and a copy of the tensor of each rank that has come.
        taken: ranks that have collected.
        total: the sum, once somebody has needed it.
    """

    brought: dict[int, tuple[str, torch.Tensor]] = field(default_factory=dict)
    taken: int = 0
    total: torch.Tensor | None = None


class LoopbackHub:
    """The meeting point of `world_size` threads.

    A start leaves a copy of what it brings, and a wait collects when every rank has started. So no
    rank waits for another one to collect, and waits may come in any order. Sums are made in rank
    order: equal bits everywhere and in every run.

    Args:
        world_size: number of ranks, >= 1.
        timeout_s: a wait that lasts longer raises `TransportTimeout`, seconds.
        delay: called by every wait before it collects, on the waiting thread; a test blocks in it,
            or moves a virtual clock on.
    """

    def __init__(
        self, world_size: int, timeout_s: float = 60.0, delay: Delay | None = None
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.delay = delay
        self._aborted = False
        self._meetings: dict[int, _Meeting] = {}
        self._changed = threading.Condition()

    def transport(self, rank: int) -> LoopbackTransport:
        """The end of `rank`; one thread uses it."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), got {rank}")
        return LoopbackTransport(self, rank)

    def abort(self) -> None:
        """Wake everyone who waits, with an error: a rank is gone."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

    def bring(self, rank: int, number: int, operation: str, tensor: torch.Tensor) -> None:
        """Leave what `rank` brings to its call `number`."""
        brought = tensor.detach().clone()
        with self._changed:
            meeting = self._meetings.setdefault(number, _Meeting())
            meeting.brought[rank] = (operation, brought)
            if self._is_complete(number):
                self._changed.notify_all()

    def complete(self, number: int) -> bool:
        """Everybody has started call `number`, or nobody ever will."""
        with self._changed:
            return self._is_complete(number) or self._aborted

    def collect(self, rank: int, number: int, operation: str) -> list[torch.Tensor]:
        """What all ranks brought to call `number`, in rank order; not to be changed."""
        with self._changed:
            come = self._changed.wait_for(
                lambda: self._is_complete(number) or self._aborted, self.timeout_s
            )
            meeting = self._meetings[number]
            missing = [r for r in range(self.world_size) if r not in meeting.brought]
            if missing:
                listed = ", ".join(map(str, missing))
                if come:
                    raise TransportError(
                        f"{operation} on rank {rank} of {self.world_size} failed: the hub was "
                        f"aborted before rank {listed} came"
                    )
                raise TransportTimeout(
                    f"{operation} on rank {rank} of {self.world_size} had no answer from rank "
                    f"{listed} within {self.timeout_s:g} s"
                )
            _check_equal(meeting)
            meeting.taken += 1
            if meeting.taken == self.world_size:
                del self._meetings[number]
            return [meeting.brought[r][1] for r in range(self.world_size)]

    def sum(self, rank: int, number: int) -> torch.Tensor:
        """The sum of what all ranks brought to call `number`; not to be changed."""
        with self._changed:
            meeting = self._meetings[number]
        brought = self.collect(rank, number, "all_reduce")
        with self._changed:
            if meeting.total is None:
                meeting.total = brought[0].clone()
                for tensor in brought[1:]:
                    meeting.total.add_(tensor)
            return meeting.total

    def _is_complete(self, number: int) -> bool:
        return len(self._meetings[number].brought) == self.world_size


class LoopbackTransport(Transport):
    """One thread's end of a `LoopbackHub`."""

    def __init__(self, hub: LoopbackHub, rank: int) -> None:
        self.rank = rank
        self.world_size = hub.world_size
        self._hub = hub
        self._gate = Gate("loopback")
        self._calls = 0

    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_gather`. Collective."""
        self._gate.check()
        check_all_gather(payload, out, self.world_size)

        def collect(number: int) -> None:
            for row, brought in zip(
                out, self._hub.collect(self.rank, number, "all_gather"), strict=True
            ):
                row.copy_(brought)

        return self._start("all_gather", payload, collect)

    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_to_all`. Collective."""
        self._gate.check()
        check_all_to_all(send, out, self.world_size)

        def collect(number: int) -> None:
            for row, brought in zip(
                out, self._hub.collect(self.rank, number, "all_to_all"), strict=True
            ):
                row.copy_(brought[self.rank])

        return self._start("all_to_all", send, collect)

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        """See `Transport.start_all_reduce`; adds in rank order. Collective."""
        self._gate.check()
        check_all_reduce(tensor)

        def collect(number: int) -> None:
            tensor.copy_(self._hub.sum(self.rank, number))

        return self._start("all_reduce", tensor, collect)

    def close(self) -> None:
        """See `Transport.close`. Local."""
        self._gate.close()

    def _start(self, operation: str, tensor: torch.Tensor, collect: Callable[[int], None]) -> Work:
        number = self._calls
        self._calls += 1
        self._hub.bring(self.rank, number, operation, tensor)
        return _LoopbackCall(self._gate, self._hub, (operation, self.rank, number), collect)


class _LoopbackCall(Call):
    """One rank's part of one collective.

    Args:
        gate: of the transport.
        hub: where the ranks meet.
        place: operation, rank, number.
        collect: fetches what the call is for.
    """

    def __init__(
        self,
        gate: Gate,
        hub: LoopbackHub,
        place: tuple[str, int, int],
        collect: Callable[[int], None],
    ) -> None:
        super().__init__(gate)
        self._hub = hub
        self._place = place
        self._collect = collect

    def _finish(self) -> None:
        if self._hub.delay is not None:
            self._hub.delay(*self._place)
        self._collect(self._place[2])

    def _has_ended(self) -> bool:
        return self._hub.complete(self._place[2])


def _check_equal(meeting: _Meeting) -> None:
    """Everybody must have brought the same call with the same size."""
    kinds = [
        (operation, tuple(tensor.shape), tensor.dtype)
        for _, (operation, tensor) in sorted(meeting.brought.items())
    ]
    if any(kind != kinds[0] for kind in kinds):
        listed = "; ".join(f"rank {r}: {kind[0]} {kind[1]}" for r, kind in enumerate(kinds))
        raise RankMismatchError(f"ranks must make the same call with the same size, got {listed}")
