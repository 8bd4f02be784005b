"""With `min_islands` a lost rank is started again alone, while the others train on."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Before a rank is started again; it doubles from life to life."""


@dataclass
class Comebacks:
    """What may be started again, and when.

    Args:
        least: so many ranks train on.
        trains: whether the run has come as far as its first exchange; before, all start anew.
        may: whether one more may be started; it counts.
        every_s: seconds between questions to a lost host.

    Attributes:
        least: see there.
        trains: see there.
        every_s: see there.
    """

    least: int
    trains: Callable[[], bool]
    may: Callable[[], bool]
    every_s: float
    _due_s: dict[Hashable, float] = field(default_factory=dict)
    _pause_s: dict[Hashable, float] = field(default_factory=dict)

    def later(self, who: Hashable, free_s: float = 0.0) -> None:
        """Start it again after its pause, and not before `free_s` on the monotonic clock."""
        if not self.may():
            return
        pause_s = self._pause_s.get(who, FIRST_PAUSE_S)
        self._pause_s[who] = min(2 * pause_s, LONGEST_PAUSE_S)
        self._due_s[who] = max(time.monotonic() + pause_s, free_s)

    def due(self, who: Hashable) -> bool:
        """Whether it is time to start it; says so once."""
        if time.monotonic() < self._due_s.get(who, float("inf")):
            return False
        del self._due_s[who]
        return True
