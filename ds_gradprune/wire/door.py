"""An island asks to be let in: it writes a ticket into the store, and shows life until it is heard.

::

    ask                 the island that asks and its ticket; one at a time
    asks/ticket         counted up while it waits
    let_in/ticket       the epoch that it is a member of
    now                 the islands of the current epoch
    over                the run has ended

The ticket is new for every process, so an island that was lost and the one that takes its place are
never taken for each other.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from ds_gradprune.errors import RankMismatchError, TransportError, TransportTimeout
from ds_gradprune.wire.bounded import Bounded
from ds_gradprune.wire.entries import count_of, islands_of, ticket_of

TICKET_CHARS = 16
ASK_S = 0.1
"""From one sign of life of who asks to the next."""

LIFE_S = 1.0
"""So long a sign of life holds."""

ALIVE_BEATS = 4
"""Signs of life of an island's process while another one asks in its place: it is not lost."""

_NAP_S = 0.02


@dataclass(frozen=True)
class Candidate:
    """Who asks to be let in.

    Attributes:
        island: its number.
        ticket: of its process.
    """

    island: int
    ticket: str = field(default_factory=lambda: uuid.uuid4().hex[:TICKET_CHARS])

    def as_json(self) -> str:
        """As it lies in the store."""
        return json.dumps([self.island, self.ticket])


class Door:
    """Where the islands of a run see who asks.

    Args:
        store: of the run.

    Attributes:
        candidate: asks, and shows life; None: nobody does, as far as this island has looked.
    """

    def __init__(self, store: Bounded) -> None:
        self.candidate: Candidate | None = None
        self._store = store
        self._seen = ("", "")
        self._lived_s = -LIFE_S

    def look(self, inside: Collection[int]) -> None:
        """Look who asks. Who has shown life between two looks, just now, is a candidate. Local.

        Args:
            inside: the islands of the epoch; a number that is theirs is not free yet.
        """
        asks = self._store.text("ask")
        if not asks:
            self.candidate = None
            return
        candidate = Candidate(*ticket_of(asks))
        seen, self._seen, now_s = self._seen, (asks, self._count(candidate)), time.monotonic()
        if seen[0] != asks:
            self._lived_s = -LIFE_S
        elif seen[1] != self._seen[1]:
            self._lived_s = now_s
        lives = now_s - self._lived_s < LIFE_S
        self.candidate = candidate if lives and candidate.island not in inside else None

    def shows_life(self, candidate: Candidate, limit_s: float) -> bool:
        """Whether it still waits. Local."""
        before, deadline_s = self._count(candidate), time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            time.sleep(_NAP_S)
            if self._count(candidate) != before:
                return True
        return False

    def let_in(self, ticket: str, number: int) -> None:
        """Tell it of which epoch it is a member. Local."""
        self._store.set(f"let_in/{ticket}", str(number))

    def _count(self, candidate: Candidate) -> str:
        return self._store.text(f"asks/{candidate.ticket}")


def ask(
    store: Bounded,
    candidate: Candidate,
    patience_s: float,
    look: Callable[[], object] = lambda: None,
    has_turn: Callable[[str], bool] | None = None,
) -> int:
    """Wait to be let in.

    Args:
        store: of the run.
        candidate: this island.
        patience_s: so long none of the islands inside may show life.
        look: called again and again; raises where the wait is in vain.
        has_turn: whether another rank of this island asks, with this text, at its door; so all of
            an island ask together. None: this one is the first of its island.

    Returns:
        The epoch that it is a member of.

    Raises:
        TransportTimeout: nobody lives inside.
        TransportError: the run has ended, or the store is gone.
        RankMismatchError: the process of this island that is inside lives.

    Local.
    """
    beats, changed_s = "", time.monotonic()
    others: set[str] = set()
    while not (number := store.text(f"let_in/{candidate.ticket}")):
        if store.check(["over"]):
            raise TransportError(
                f"the run has ended before island {candidate.island} was let in. Its checkpoints "
                "and its model are complete; start all again with --resume to go on."
            )
        look()
        store.add(f"asks/{candidate.ticket}", 1)
        if has_turn is None:
            _take_turn(store, candidate)
        elif has_turn(candidate.as_json()):
            store.set("ask", candidate.as_json())
        inside = {i: store.text(f"beat/{i}") for i in islands_of(store.text("now") or "[]")}
        others.add(inside.get(candidate.island, ""))
        if len(others) > ALIVE_BEATS:
            raise RankMismatchError(
                f"island {candidate.island} must be one process, but another one takes part in the "
                "run and lives. Start it again when that one has ended."
            )
        now = " ".join(inside.values())
        if now != beats:
            beats, changed_s = now, time.monotonic()
        elif time.monotonic() - changed_s > patience_s:
            raise TransportTimeout(
                f"island {candidate.island} asks to be let in, but no island of the run has shown "
                f"life for {patience_s:g} s. Start all again, and resume from the last checkpoint."
            )
        time.sleep(ASK_S)
    store.compare_set("ask", candidate.as_json(), "")
    return count_of(number)


def _take_turn(store: Bounded, candidate: Candidate) -> None:
    """Ask, if nobody else does who still shows life. Local."""
    mine = candidate.as_json()
    asks = store.compare_set("ask", "", mine)
    if asks == mine:
        return
    other = Candidate(*ticket_of(asks))
    if not Door(store).shows_life(other, 10 * ASK_S):
        store.compare_set("ask", asks, mine)
