"""Lets an exchange travel in a thread of its own while the computation goes on.

The thread waits for the network and so holds the interpreter for moments only. It alone uses the
channel until it has ended, so the order of collectives is the same on all ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Flight(Generic[T]):
    """Work under way.

    Args:
        work: what the thread does.
        clock: seconds, monotonic.

    Attributes:
        lasted_s: how long the work took; 0.0 until it is over.
    """

    def __init__(self, work: Callable[[], T], clock: Callable[[], float]) -> None:
        self.lasted_s = 0.0
        self._work = work
        self._clock = clock
        self._result: T | None = None
        self._error: BaseException | None = None
        # A daemon: where the process ends in an error, nobody waits for the link.
        self._thread = threading.Thread(target=self._run, name="ds_gradprune flight", daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Whether `land` would return, or raise, at once. Local; ranks may see different answers.

        What all ranks must do alike must not depend on it.
        """
        return not self._thread.is_alive()

    def land(self) -> T:
        """Wait for the work.

        Raises:
            BaseException: what the work raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return cast(T, self._result)

    def _run(self) -> None:
        began_s = self._clock()
        try:
            self._result = self._work()
        except BaseException as exc:
            self._error = exc
        self.lasted_s = self._clock() - began_s
