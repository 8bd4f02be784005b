"""torch.distributed as a transport: gloo on CPU, nccl on GPUs. Knows nothing of DeepSpeed."""

from __future__ import annotations

import contextlib
import datetime
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.errors import TransportError
from ds_gradprune.wire.transport import (
    Call,
    Finished,
    Gate,
    Transport,
    Work,
    check_all_gather,
    check_all_reduce,
    check_all_to_all,
    no_answer,
    peers_of,
)

_all_gather_whole: Callable[..., Any] = getattr(
    dist, "all_gather_single", dist.all_gather_into_tensor
)
"""torch 2.13 renamed it and warns about the old name."""

SEGMENT_BYTES = 256 * 1024
"""Longer payloads are gathered in segments. All of them are queued at once, and gloo's threads work
on two at a time. In one piece megabytes leave the host as fast as TCP takes them, the queues of a
slow link overflow, and what they dropped is sent again: 5 MB at 20 Mbit/s took 3.7 s instead of 2.3
(LOG.md, 2026-11-24)."""

_NAP_S = 200e-6
"""Between two looks at a call of nccl."""

_LEAST_S = 1e-3
"""Shortest time-out handed to torch; a call that has ended needs none."""

# What gloo's messages (torch 2.13) are told apart by.
_TIMED_OUT = ("timed out", "application timeout")
_PEER_GONE = ("connection closed", "connection reset", "broken pipe", "connection refused")
_GROUP_LIMIT = re.compile(r"Timed out waiting (\d+)ms")
_ADDRESS = re.compile(r"\[([0-9a-fA-F.:]+)\]:\d+")
_NOISE = re.compile(r"^\[[^\]]*:\d+\]\s*")


class TorchDistTransport(Transport):
    """One rank's end of a torch.distributed process group.

    The group is borrowed: `close` leaves it alone. A collective of others on the same group waits
    behind a call under way, so a call that is to be hidden wants a group of its own. Over nccl a
    payload is staged through device memory, because nccl reads nothing else.

    The group's own time-out holds too, counted from the moment gloo begins a piece of a call.

    Args:
        group: process group; None means the world.
        timeout_s: longest wait for one call, seconds.
        is_apart: the group is gloo's and was made beside torch's world, see `epochs`.

    Raises:
        TransportError: torch.distributed is not initialised.
    """

    def __init__(
        self, group: Any = None, timeout_s: float = 600.0, *, is_apart: bool = False
    ) -> None:
        if not is_apart and not (dist.is_available() and dist.is_initialized()):
            raise TransportError(
                "torch.distributed must be initialised before the torch transport is opened"
            )
        self._group = group
        self._timeout_s = timeout_s
        self._gate = Gate("torch")
        self._step: int | None = None
        self.rank = group.rank() if is_apart else dist.get_rank(group)
        self.world_size = group.size() if is_apart else dist.get_world_size(group)
        config = "cpu:gloo" if is_apart else dist.get_backend_config(group)
        self._on_device = "cpu" not in config
        self._on_nccl = "nccl" in config
        # Noted here: a call may be started in a thread of its own, which begins on device 0.
        self._device = (
            torch.device("cuda", torch.cuda.current_device()) if self._on_device else None
        )

    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_gather`; both may lie on the GPU. Collective."""
        self._gate.check()
        check_all_gather(payload, out, self.world_size, payload.device.type)
        if payload.numel() == 0:
            return Finished()
        if self._on_device:
            return self._staged("all_gather", _all_gather_whole, payload, out)
        if payload.numel() <= SEGMENT_BYTES:
            return self._start("all_gather", [(_all_gather_whole, out.view(-1), payload)])
        pieces = []
        for first in range(0, payload.numel(), SEGMENT_BYTES):
            part = slice(first, first + SEGMENT_BYTES)
            pieces.append((dist.all_gather, [row[part] for row in out], payload[part]))
        return self._start("all_gather", pieces)

    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_to_all`. Collective."""
        self._gate.check()
        check_all_to_all(send, out, self.world_size)
        if send.numel() == 0:
            return Finished()
        if self._on_device:
            return self._staged("all_to_all", dist.all_to_all_single, send, out)
        # gloo wants whole rows: a segment of all rows is sent from, and arrives in, its own memory.
        width = max(1, SEGMENT_BYTES // self.world_size)
        if send.shape[1] <= width:
            return self._start("all_to_all", [(dist.all_to_all_single, out, send)])
        pieces, arrivals = [], []
        for first in range(0, send.shape[1], width):
            part = send[:, first : first + width].contiguous()
            arrived = torch.empty_like(part)
            pieces.append((dist.all_to_all_single, arrived, part))
            arrivals.append((out[:, first : first + width], arrived))
        return self._start("all_to_all", pieces, arrivals)

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        """See `Transport.start_all_reduce`. Collective."""
        self._gate.check()
        check_all_reduce(tensor)
        return self._start("all_reduce", [(dist.all_reduce, tensor)])

    def advance(self, step: int) -> None:
        """See `Transport.advance`; errors name the step. Local."""
        self._step = step

    def close(self) -> None:
        """See `Transport.close`. Local; the group stays its owner's."""
        self._gate.close()

    def _staged(
        self, operation: str, collective: Callable[..., Any], send: torch.Tensor, out: torch.Tensor
    ) -> Work:
        arrived = torch.empty(out.shape, dtype=torch.uint8, device=self._device)
        pieces = [(collective, arrived.view(-1), send.to(self._device).view(-1))]
        return self._start(operation, pieces, [(out, arrived)])

    def _start(
        self,
        operation: str,
        pieces: Sequence[tuple[Any, ...]],
        arrivals: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> Work:
        """Queue the pieces of a call: (collective, its tensors) each; then copy what arrived."""
        place = (self.rank, self.world_size)
        if self._step is not None:
            operation = f"{operation} of step {self._step}"
        polls = self._on_nccl and pieces[0][-1].is_cuda
        call = _TorchCall(self._gate, operation, place, self._timeout_s, arrivals, polls)
        try:
            with call.told():
                for collective, *tensors in pieces:
                    call.works.append(collective(*tensors, group=self._group, async_op=True))
        except TransportError as exc:
            self._gate.fail(exc)
            raise
        return call


class _TorchCall(Call):
    """One call: its pieces are torch.distributed's works.

    Args:
        gate: of the transport.
        operation: for messages.
        place: rank and world size, for messages.
        timeout_s: longest wait.
        arrivals: (target, source) pairs that are copied when all pieces have arrived.
        polls: the works are nccl's, which time out by ending the process.

    Attributes:
        works: of the pieces, in order.
    """

    def __init__(
        self,
        gate: Gate,
        operation: str,
        place: tuple[int, int],
        timeout_s: float,
        arrivals: Sequence[tuple[torch.Tensor, torch.Tensor]],
        polls: bool,
    ) -> None:
        super().__init__(gate)
        self._polls = polls
        self._operation = operation
        self._place = place
        self._timeout_s = timeout_s
        self._arrivals = arrivals
        self.works: list[Any] = []

    def _finish(self) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        with self.told():
            for work in self.works:
                self._wait_for(work, deadline_s)
            for target, source in self._arrivals:
                target.copy_(source)
        self.works.clear()
        self._arrivals = ()

    def _has_ended(self) -> bool:
        return all(work.is_completed() for work in self.works)

    def _wait_for(self, work: Any, deadline_s: float) -> None:
        if self._polls:
            while not work.is_completed():
                if time.monotonic() >= deadline_s:
                    raise no_answer(self._operation, *self._place, self._timeout_s)
                time.sleep(_NAP_S)
            work.wait()  # has ended: lets the current stream see it, or raises what it failed with
            return
        left_s = deadline_s - time.monotonic()
        # torch takes 0 for "no limit".
        work.wait(datetime.timedelta(seconds=max(left_s, _LEAST_S)))

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """What torch raises, in our own words."""
        try:
            yield
        except RuntimeError as exc:
            raise self._translated(str(exc)) from exc

    def _translated(self, text: str) -> TransportError:
        lowered = text.lower()
        rank, world_size = self._place
        if any(sign in lowered for sign in _TIMED_OUT):
            own = _GROUP_LIMIT.search(text)
            limit_s = self._timeout_s if own is None else int(own.group(1)) / 1e3
            return no_answer(self._operation, rank, world_size, limit_s)
        where = f"{self._operation} on rank {rank} of {world_size} failed"
        if any(sign in lowered for sign in _PEER_GONE):
            address = _ADDRESS.search(text)
            at = "" if address is None else f" (at {address.group(1)})"
            peers = peers_of(rank, world_size)
            whom = peers if world_size <= 2 else f"one of {peers}"
            return TransportError(
                f"{where}: {whom}{at} has closed the connection. Its process has ended or its host "
                "is gone: look for the last lines of its output"
            )
        return TransportError(f"{where}: {_cleaned(text)}")


def _cleaned(text: str) -> str:
    """The first sentence of a message of torch: no place in its source, no stack, no emoji."""
    line = _NOISE.sub("", text.split("\n")[0])
    return line.encode("ascii", "ignore").decode().strip().rstrip(".") or "torch gave no reason"
