"""A set of islands that make calls together, and how long they wait for each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """A set of islands.

    Attributes:
        number: from 0.
        islands: who takes part, rising.
        done: island -> the calls that it has finished.
        newcomer: the island that was let in; None: there is none.
        lives: island -> the ticket of its processes, where they came back.
    """

    number: int
    islands: tuple[int, ...]
    done: Mapping[int, int]
    newcomer: int | None = None
    lives: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pace:
    """How often islands show life, and how long they are waited for; seconds.

    Attributes:
        beat_s: from one sign of life to the next.
        silent_s: an island that has shown no life for so long is not waited for.
        late_s: one that shows life may come so much later than a time-out: it may be busy with an
            attempt to connect, which gloo gives up late.
    """

    beat_s: float = 0.5
    silent_s: float = 5.0
    late_s: float = 30.0


def epoch_of(number: int, found: Mapping[str, Any]) -> Epoch:
    """What lies in the store of an epoch. Pure."""
    done = {int(island): int(calls) for island, calls in found["done"].items()}
    lives = {int(island): str(ticket) for island, ticket in found["lives"].items()}
    return Epoch(number, tuple(sorted(done)), done, found["newcomer"], lives)
