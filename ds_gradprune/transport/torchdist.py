"""torch.distributed as a transport: gloo on CPU, nccl on GPUs. Knows nothing of DeepSpeed."""

from __future__ import annotations

import collections
import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.errors import TransportError, TransportTimeout
from ds_gradprune.transport.base import Transport

_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""torch 2.13 renamed it and warns about the old name."""

SEGMENT_BYTES = 256 * 1024
IN_FLIGHT = 4
"""A payload is gathered in segments, so many at a time. In one piece megabytes leave the host as
fast as TCP takes them, the queues of a slow link overflow, and what they dropped is sent again:
5 MB at 20 Mbit/s took 3.7 s instead of 2.3 (benchmarks/gather.py; LOG.md, 2026-11-24)."""


class TorchDistTransport(Transport):
    """One rank's end of a torch.distributed process group.

    The group is borrowed: `close` leaves it alone. Over nccl a payload is staged through device
    memory, because nccl reads nothing else.

    Args:
        group: process group; None means the world.
        timeout_s: longest wait for one collective, seconds.

    Raises:
        TransportError: torch.distributed is not initialised.
    """

    def __init__(self, group: Any = None, timeout_s: float = 600.0) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise TransportError(
                "torch.distributed must be initialised before the torch transport is opened"
            )
        self._group = group
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._on_device = dist.get_backend(group) == "nccl"

    def all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        """See `Transport.all_gather`. Collective."""
        if payload.numel() == 0:
            return
        if not self._on_device:
            self._gather_segments(payload, out)
            return
        staged = torch.empty(out.numel(), dtype=torch.uint8, device="cuda")
        self._run("all_gather", _all_gather, staged, payload.to("cuda"))
        out.copy_(staged.view_as(out))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """See `Transport.all_reduce`. Collective."""
        self._run("all_reduce", dist.all_reduce, tensor)

    def close(self) -> None:
        """See `Transport.close`. Local; the group stays its owner's."""

    def _gather_segments(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        if payload.numel() <= SEGMENT_BYTES:
            self._run("all_gather", _all_gather, out.view(-1), payload)
            return
        flying: collections.deque[Any] = collections.deque()
        with self._errors_told("all_gather"):
            for first in range(0, payload.numel(), SEGMENT_BYTES):
                if len(flying) == IN_FLIGHT:
                    flying.popleft().wait(self._timeout)
                part = slice(first, first + SEGMENT_BYTES)
                rows = [row[part] for row in out]
                flying.append(
                    dist.all_gather(rows, payload[part], group=self._group, async_op=True)
                )
            for work in flying:
                work.wait(self._timeout)

    def _run(self, operation: str, collective: Callable[..., Any], *tensors: torch.Tensor) -> None:
        with self._errors_told(operation):
            collective(*tensors, group=self._group, async_op=True).wait(self._timeout)

    @contextlib.contextmanager
    def _errors_told(self, operation: str) -> Iterator[None]:
        """In our own words, and a time-out apart from the rest."""
        start_s = time.monotonic()
        try:
            yield
        except RuntimeError as exc:
            waited_s = time.monotonic() - start_s
            limit_s = self._timeout.total_seconds()
            if waited_s >= limit_s or "timed out" in str(exc).lower():
                raise TransportTimeout(
                    f"{operation} on rank {self.rank} of {self.world_size} had no answer within "
                    f"{limit_s:g} s"
                ) from exc
            raise TransportError(
                f"{operation} on rank {self.rank} of {self.world_size} failed: {exc}"
            ) from exc
