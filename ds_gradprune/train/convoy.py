"""Messages that leave one after the other while the computation goes on, in a thread of their own.

The computation adds a departure as soon as what it sends is complete. The thread prepares it, lets
it travel, and prepares the next one meanwhile. It alone uses the channel until it has ended, and
its calls follow from the order of the departures, so the order of collectives is the same on all
ranks::

    start 0, start 1, proceed 0, start 2, proceed 1, ..., last word, proceed n, wait for all
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch

from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.channel import Pending

POLL_S = 1e-3
"""While something travels the thread looks so often whether it has arrived."""

Departure = Callable[[], Pending]
"""Prepares a message and lets it travel. Collective."""


class Convoy:
    """Departures of one round.

    Args:
        stopwatch: of the computation; `land` notes there what was waited for and what was hidden.
        clock: seconds, monotonic; read in both threads.
    """

    def __init__(self, stopwatch: Stopwatch, clock: Callable[[], float]) -> None:
        self._stopwatch = stopwatch
        self._clock = clock
        self._queue: queue.SimpleQueue[Departure | None] = queue.SimpleQueue()
        self._last: Callable[[], object] | None = None
        self._have_left = threading.Event()
        self._error: BaseException | None = None
        self._pending: list[Pending] = []
        self._begun_s: list[float] = []
        self._ended_s: list[float] = []
        # A daemon: where the process ends in an error, nobody waits for the link.
        self._thread = threading.Thread(target=self._run, name="ds_gradprune convoy", daemon=True)
        self._thread.start()

    def add(self, departure: Departure) -> None:
        """One more. Local."""
        self._queue.put(departure)

    def close(self, last: Callable[[], object] | None = None) -> None:
        """No more departures follow. Local.

        Args:
            last: the thread's last word to its peers, once everything has left.
        """
        self._last = last
        self._queue.put(None)

    def land(self) -> None:
        """Wait until everything has arrived, after `close`.

        Raises:
            BaseException: what went wrong in the thread.
        """
        with self._stopwatch.phase("codec"):
            self._have_left.wait()
        began_s = self._clock()
        with self._stopwatch.phase("wire"):
            self._thread.join()
        exposed_s = self._clock() - began_s
        self._stopwatch.add_hidden(max(0.0, self.busy_s() - exposed_s))
        if self._error is not None:
            raise self._error

    def busy_s(self) -> float:
        """How long something was on the way, seconds. Local; after `land`."""
        busy_s, before_s = 0.0, -float("inf")
        for begun_s, ended_s in zip(self._begun_s, self._ended_s, strict=False):
            busy_s += max(0.0, ended_s - max(begun_s, before_s))
            before_s = max(before_s, ended_s)
        return busy_s

    @torch.no_grad()
    def _run(self) -> None:
        try:
            while (departure := self._next()) is not None:
                pending = departure()
                self._begun_s.append(self._clock())
                if self._pending:
                    self._pending[-1].proceed()
                self._pending.append(pending)
            self._have_left.set()
            if self._last is not None:
                self._last()
            if self._pending:
                self._pending[-1].proceed()
            for pending in self._pending:
                pending.wait()
                self._look()
        except BaseException as exc:
            self._error = exc
        finally:
            self._have_left.set()

    def _next(self) -> Departure | None:
        """The next departure; what arrives meanwhile is noted."""
        self._look()
        while len(self._ended_s) < len(self._pending):
            try:
                return self._queue.get(timeout=POLL_S)
            except queue.Empty:
                self._look()
        return self._queue.get()

    def _look(self) -> None:
        """Note what has arrived."""
        while len(self._ended_s) < len(self._pending):
            if not self._pending[len(self._ended_s)].done():
                return
            self._ended_s.append(self._clock())
