"""How many of this host's cores others use while something is measured. Linux, local."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

STAT = Path("/proc/stat")

IDLE = (3, 4)
"""Fields of a line of `STAT` behind its name: idle, and idle while a disk is waited for."""

COUNTED = 8
"""Fields from user to steal. Those behind them are part of user."""


class Others:
    """From its making on, the processor time that this process did not use.

    Args:
        clock: seconds.
        own: processor seconds of this process.
        stat: the system's counters.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        own: Callable[[], float] = time.process_time,
        stat: Path = STAT,
    ) -> None:
        self._clock, self._own, self._stat = clock, own, stat
        self._began = (clock(), own(), _busy_s(stat))

    def cores(self) -> float | None:
        """Cores that others kept busy on average; None: the system does not tell."""
        began_s, own_s, busy_s = self._began
        now_s = _busy_s(self._stat)
        lasted_s = self._clock() - began_s
        if busy_s is None or now_s is None or lasted_s <= 0.0:
            return None
        return max(0.0, (now_s - busy_s - (self._own() - own_s)) / lasted_s)


def _busy_s(stat: Path) -> float | None:
    """Seconds that the cores which this process may use were busy since the system's start."""
    try:
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = [line.split() for line in stat.read_text(encoding="ascii").splitlines()]
    except (OSError, AttributeError):  # no such file, or no such call: not Linux
        return None
    rows = [[int(field) for field in words[1 : 1 + COUNTED]] for words in lines if words[0] in mine]
    ticks = sum(sum(row) - sum(row[field] for field in IDLE) for row in rows)
    return ticks / os.sysconf("SC_CLK_TCK")
