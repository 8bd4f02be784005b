"""No wait outlives `timeout_s`: the limits of waits that torch leaves without one.

A collective of gloo has the time-out of its group, which `limited` shortens for a block. A question
to rank 0's store has none: where rank 0 is frozen or its cable is out, it lasts for ever, in the
middle of C++. Such a wait is ended with the process. `deadline` does so after a fixed time, for
short blocks. A `Pulse` does so where another rank has shown no life, for whole runs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from ds_gradprune.wire.lost import is_timeout
from ds_gradprune.wire.transport import peers_of

T = TypeVar("T")

BEAT_S = 1.0
"""From one sign of life to the next."""

GRACE_S = 3.0
"""What waits in a collective fails by itself at about the same time, and says more."""

LEAVE_S = 3.0
"""Ranks that have all done their work agree on it within two beats."""

LATE_S = 5.0
"""A wait with no deadline of its own ends so long after `timeout_s`."""


class Pulse:
    """Shows life to all ranks, from a thread, until it is closed. A context manager.

    Where another rank is silent for too long, and this one's work does not end by itself, the
    thread says so and ends the process.

    Args:
        group: gloo's, of all ranks, and of nobody else; its time-out is `timeout_s`. None: there is
            one process, and nothing to show.
        timeout_s: the longest silence.
        doing: what this rank is at, "saving a checkpoint"; for the message.
        standing: how far the run has come, in whole sentences; for the message.
        end: called with the message when another rank is silent; None: the process ends.

    Collective: all ranks construct it.
    """

    def __init__(
        self,
        group: Any,
        timeout_s: float,
        *,
        doing: Callable[[], str],
        standing: Callable[[], str] = str,
        end: Callable[[str], object] | None = None,
    ) -> None:
        self._group = group
        self._timeout_s = timeout_s
        self._doing = doing
        self._standing = standing
        self._end = end or end_now
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        if group is not None:
            self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
            self._thread.start()

    def close(self) -> None:
        """This rank's work is over, well or not; it still answers while it lives. Local."""
        self._closed.set()

    def __enter__(self) -> Pulse:
        """Nothing: it beats since it was made."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _: object
    ) -> None:
        """Close; after good work, when all are there."""
        self.close()
        if kind is None and self._group is not None:
            self._thread.join(LEAVE_S)

    def _beat(self) -> None:
        mine = torch.zeros(1, dtype=torch.uint8)
        rows = [torch.empty_like(mine) for _ in range(self._world_size)]
        try:
            while not all(int(row) for row in rows) or not self._closed.is_set():
                mine[0] = self._closed.is_set()
                dist.all_gather(rows, mine, group=self._group)
                self._closed.wait(BEAT_S)
        except RuntimeError as exc:  # torch's own, where a rank is gone
            # A rank that has ended has told why. What waits for it fails at once.
            timed_out = is_timeout(exc)
            if not self._closed.wait(GRACE_S if timed_out else self._timeout_s):
                self._end(self._message(timed_out))

    def _message(self, timed_out: bool) -> str:
        rank, world_size = self._rank, self._world_size
        who = peers_of(rank, world_size)
        who = who if world_size == 2 else f"at least one of {who}"
        what = "has shown no life" if timed_out else "has ended, and this one could not go on,"
        text = (
            f"{who} {what} for {self._timeout_s:g} s (gradient_pruning.timeout_s), says rank "
            f"{rank} of {world_size} on {socket.gethostname()}, while {self._doing()}. Its host or "
            "its link is gone, or it is frozen. Look at what it wrote last."
        )
        return f"{text} {self._standing()}".rstrip()


@contextlib.contextmanager
def deadline(limit_s: float, doing: str) -> Iterator[None]:
    """End the process if the block takes longer: for waits of torch that have no end. Local.

    Args:
        limit_s: seconds.
        doing: "finding the other ranks", for the message.
    """
    message = (
        f"{doing} must end within {limit_s:g} s (gradient_pruning.timeout_s and some more) on "
        f"{socket.gethostname()}, but another rank is silent. Look at what the other ranks wrote "
        "last."
    )
    timer = threading.Timer(limit_s, end_now, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def limited(timeout_s: float, *groups: Any) -> Iterator[None]:
    """No wait that begins inside, in these groups, is longer. Local.

    What gloo moves only: nccl's watchdog ends the process after the time that its group was given.

    Args:
        timeout_s: a group with a shorter time-out keeps it.
        groups: process groups; None where there is none.
    """
    limits: list[tuple[Any, timedelta]] = []
    for group in groups:
        backend = _gloo_of(group)
        if backend is not None:
            before = backend.options._timeout
            limits.append((backend, before))
            backend._set_default_timeout(min(before, timedelta(seconds=timeout_s)))
    try:
        yield
    finally:
        for backend, before in reversed(limits):
            backend._set_default_timeout(before)


def limit(timeout_s: float, group: Any) -> None:
    """As `limited`, from now on. Local."""
    backend = _gloo_of(group)
    if backend is not None:
        backend._set_default_timeout(min(backend.options._timeout, timedelta(seconds=timeout_s)))


def asked(limit_s: float, work: Callable[[], T]) -> Future[T] | None:
    """What became of `work`; None if it takes longer, and its thread is left behind."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as exc:  # torch's own, of many kinds
            future.set_exception(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    return future if future.done() else None


def within(limit_s: float, work: Callable[[], T]) -> T | None:
    """What `work` returns; None if it fails or takes longer, see `asked`."""
    future = asked(limit_s, work)
    return None if future is None or future.exception() is not None else future.result()


def end_now(message: str) -> NoReturn:
    """Tell the error and end the process, whatever its other threads wait for. Local."""
    print(f"\nerror: {message}", file=sys.stderr, flush=True)  # behind a bar, perhaps
    os._exit(2)


def _gloo_of(group: Any) -> Any:
    """The part of a process group that moves what lies in the host's memory; None: nothing does."""
    if group is None or "cpu:gloo" not in dist.get_backend_config(group):
        return None
    return group._get_backend(torch.device("cpu"))
