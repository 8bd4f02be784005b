"""The last resort against silence: no wait outlives a rank that has shown no life for `timeout_s`.

Collectives have deadlines of their own. Some waits of torch have none, such as a question to rank
0's store when rank 0 is frozen or its cable is out. So every rank shows life from a thread, in a
group of its own. Where another rank is silent for too long, and this one's work does not end by
itself, the thread says so and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
import torch.distributed as dist

from ds_gradprune.wire.transport import peers_of

from .lost import is_timeout
from .peers import Peers

BEAT_S = 1.0
"""From one sign of life to the next."""

GRACE_S = 3.0
"""What waits in a collective fails by itself at about the same time, and says more."""

LEAVE_S = 3.0
"""Ranks that have all done their work agree on it within two beats."""

LATE_S = 5.0
"""A wait with no deadline of its own ends so long after `timeout_s`."""


class Pulse:
    """Shows life to all ranks until it is closed. A context manager.

    Args:
        peers: all ranks; their `timeout_s` is the longest silence.
        end: called with the message when another rank is silent; None: the process ends.

    Collective: all ranks construct it.
    """

    def __init__(self, peers: Peers, end: Callable[[str], object] | None = None) -> None:
        self._peers = peers
        self._end = end or end_now
        self._closed = threading.Event()
        self._group = peers.new_group()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        if self._group is not None:
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
        rows = [torch.empty_like(mine) for _ in range(self._peers.world_size)]
        try:
            while not all(int(row) for row in rows) or not self._closed.is_set():
                mine[0] = self._closed.is_set()
                dist.all_gather(rows, mine, group=self._group)
                self._closed.wait(BEAT_S)
        except RuntimeError as exc:  # torch's own, where a rank is gone
            # A rank that has ended has told why. What waits for it fails at once.
            timed_out = is_timeout(exc)
            if not self._closed.wait(GRACE_S if timed_out else self._peers.timeout_s):
                self._end(self._message(timed_out))

    def _message(self, timed_out: bool) -> str:
        peers = self._peers
        who = peers_of(peers.rank, peers.world_size)
        who = who if peers.world_size == 2 else f"at least one of {who}"
        what = "has shown no life" if timed_out else "has ended, and this one could not go on,"
        text = (
            f"{who} {what} for {peers.timeout_s:g} s (gradient_pruning.timeout_s), says rank "
            f"{peers.rank} of {peers.world_size} on {peers.host}, while {peers.doing}. Its host "
            "or its link is gone, or it is frozen. Look at what it wrote last."
        )
        return f"{text} {peers.standing()}".rstrip()


@contextlib.contextmanager
def deadline(limit_s: float, doing: str) -> Iterator[None]:
    """End the process if the block takes longer: for waits of torch that have no end. Local.

    Args:
        limit_s: seconds.
        doing: "finding the other ranks", for the message.
    """
    message = (
        f"{doing} must end within {limit_s:g} s (gradient_pruning.timeout_s and some more), but "
        "another rank is silent. Look at what the other ranks wrote last."
    )
    timer = threading.Timer(limit_s, end_now, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end_now(message: str) -> NoReturn:
    """Tell the error and end the process, whatever its other threads wait for. Local."""
    print(f"\nerror: {message}", file=sys.stderr, flush=True)  # behind a bar, perhaps
    os._exit(2)
