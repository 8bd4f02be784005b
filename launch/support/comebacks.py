"""With `min_islands` the ranks of a lost island alone are started again; the others train on."""

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
        may: whether one more island may be started; it counts.
        every_s: seconds between questions to a lost host.
        of_island: so many consecutive ranks of a host are an island, and are lost together.

    Attributes:
        least: see there.
        trains: see there.
        every_s: see there.
        of_island: see there.
    """

    least: int
    trains: Callable[[], bool]
    may: Callable[[], bool]
    every_s: float
    of_island: int = 1
    _lives: dict[Hashable, int] = field(default_factory=dict)
    _due_s: dict[Hashable, float] = field(default_factory=dict)
    _pause_s: dict[Hashable, float] = field(default_factory=dict)

    def rank_later(self, host: str, rank: int) -> None:
        """Start a rank of a host again after its pause. All ranks of an island count once."""
        who, island = (host, rank), (host, "island", rank // self.of_island)
        lives = self._lives.get(who, 0) + 1
        if lives > self._lives.get(island, 0) and not self.may():
            return
        self._lives[who] = lives
        self._lives[island] = max(lives, self._lives.get(island, 0))
        self._plan(who, 0.0)

    def host_later(self, host: str, free_s: float) -> None:
        """Start all ranks of a host again, and not before `free_s` on the monotonic clock."""
        if self.may():
            self._plan(host, free_s)

    def _plan(self, who: Hashable, free_s: float) -> None:
        pause_s = self._pause_s.get(who, FIRST_PAUSE_S)
        self._pause_s[who] = min(2 * pause_s, LONGEST_PAUSE_S)
        self._due_s[who] = max(time.monotonic() + pause_s, free_s)

    def due(self, who: Hashable) -> bool:
        """Whether it is time to start it; says so once."""
        if time.monotonic() < self._due_s.get(who, float("inf")):
            return False
        del self._due_s[who]
        return True
