"""Which islands take part: an epoch is a set of islands with a transport of its own.

No process group of torch can lose a member. So when a call has failed, the islands that are alive
agree on the next epoch and open a new transport among them::

    regroup(done)       set   epoch/island = calls that this island has finished
                        wait  for every island of the epoch, but not for one that shows no life
                        compare_set  epoch/members               the first proposal holds for all
                        open the epoch's transport

Each island shows life by counting in the store, from a thread, and looks there whether another one
has called for the next epoch. So no island waits in a call that can never end.

A lost island that comes back asks at the `door`. The others agree on it, all at the same call, and
form an epoch with it in the same way::

    regroup(done, candidate)    members: it is a newcomer, if it still shows life

The store is the judge: islands that do not reach it end. So two halves of a network that was cut
never train on side by side. Where an island keeps the store, that one cannot be lost.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds_gradprune.errors import TransportError
from ds_gradprune.wire.bounded import Bounded
from ds_gradprune.wire.door import Candidate, Door, ask
from ds_gradprune.wire.entries import count_of, proposal_of
from ds_gradprune.wire.epoch import Epoch, Pace, epoch_of
from ds_gradprune.wire.fate import Fate, LeftOut, left_out, too_few
from ds_gradprune.wire.transport import Transport

__all__ = ["Epoch", "LeftOut", "Members", "Pace"]

_FIRST_NAP_S, _LONGEST_NAP_S = 0.005, 0.25


class Members:
    """One island's view of who takes part.

    Args:
        store: a store of torch.distributed that all islands reach.
        island: this one; a number of its own for the whole run.
        opens: makes this island's end of an epoch's transport. Collective: the epoch's islands.
        timeout_s: so long a call may wait for an island that is alive.
        least: with fewer islands the run ends.
        pace: see there.
        fate: what the crews of the islands' other ranks have found; None: there are none.
        life: ticket of this island's processes, where they come back.

    Attributes:
        island: see there.
        epoch: the current one.
        transport: of the epoch.
        timeout_s: see there.
        least: see there.
        waits: this island waits for others: it looks who shows life.
        door: who asks to be let in.
        answered: the last ticket that was decided on, and whether it was let in; equal on all
            islands that have come as far.
    """

    def __init__(
        self,
        store: Any,
        island: int,
        opens: Callable[[Epoch], Transport],
        timeout_s: float,
        least: int = 1,
        pace: Pace | None = None,
        fate: Fate | None = None,
        life: str = "",
    ) -> None:
        self.island = island
        self.least = least
        self._store = Bounded(store)
        self._fate = fate or Fate(self._store)
        self._own_life = life
        self._opens = opens
        self.timeout_s = timeout_s
        self._pace = pace or Pace()
        self._seen: dict[int, tuple[str, float]] = {}
        self.waits = False
        self._called = threading.Event()
        self._closed = threading.Event()
        self.door = Door(self._store)
        self.answered = ("", False)
        self.epoch = Epoch(-1, (), {})
        self.transport: Transport | None = None

    def begin(self, islands: Sequence[int]) -> Epoch:
        """The first epoch, which all were started with. Collective: these islands."""
        self._enter(Epoch(0, tuple(sorted(islands)), dict.fromkeys(islands, 0)))
        self._begin_to_beat()
        return self.epoch

    def join(self, candidate: Candidate) -> Epoch:
        """Ask the islands of a run that goes on, and take part when they let this one in.

        Args:
            candidate: this island.

        Raises:
            TransportTimeout, TransportError: nobody lives there, or not all can be reached.

        Collective: the epoch's islands, which call `regroup`.
        """
        patience_s = self.timeout_s + self._pace.silent_s
        turn = self._fate.has_turn()
        number = ask(self._store, candidate, patience_s, self.vigil(), turn)
        epoch = epoch_of(number, proposal_of(self._store.get(f"{number}/members")))
        self._begin_to_beat()
        self._enter(epoch)
        return epoch

    @property
    def patience_s(self) -> float:
        """So long a call may keep a rank at most."""
        return 2 * self.timeout_s + self._pace.late_s + self._pace.silent_s

    def candidate(self) -> Candidate:
        """This island, as it asks to be let in. Local."""
        return Candidate(self.island, self._own_life) if self._own_life else Candidate(self.island)

    def refuse(self, candidate: Candidate) -> None:
        """Not all ranks of this one could be let in, so none takes part. Local."""
        self._fate.put_out(candidate.island, candidate.ticket)

    def vigil(self) -> Callable[[], None]:
        """See `Fate.vigil`. Local."""
        return self._fate.vigil(self.island, self._life(self.island), self.timeout_s)

    def give_up(self) -> None:
        """This island is lost: the crews of its other ranks need not wait for it. Local."""
        self._fate.give_up(self.island, self._life(self.island))

    @property
    def is_called(self) -> bool:
        """Some island has called for the next epoch: no call of this one can end any more."""
        return self._called.is_set()

    def regroup(self, done: int, candidate: Candidate | None = None) -> Epoch:
        """Go on with those that are alive: after a call has failed, or to let one in.

        Args:
            done: calls that this island has finished.
            candidate: is let in, if it shows life and nobody has called for this epoch otherwise.

        Raises:
            LeftOut: the others have gone on without this island.
            TransportTimeout: fewer than `least` answered, or the store does not.
            TransportError: the store is gone.

        Collective: the islands of the epoch that are alive.
        """
        expected, number = self.epoch.islands, self.epoch.number + 1
        while True:
            epoch = self._agree(number, done, expected, candidate)
            try:
                self._enter(epoch)
                return epoch
            except TransportError:  # one more was lost, or two do not reach each other
                if epoch.newcomer is None:  # else it is that one that is not reached
                    self._store.set(f"{number}/failed/{self.island}", "")
                expected = tuple(i for i in epoch.islands if i != epoch.newcomer)
                number, candidate = number + 1, None

    def end(self) -> None:
        """All work is done: whoever asks to be let in need not wait. Local."""
        with contextlib.suppress(TransportError):  # then there is nobody to be told
            self._store.set("over", "")

    def close(self) -> None:
        """Take part no more. Local."""
        self._closed.set()
        self._close_transport()

    # ---- details -------------------------------------------------------------------------------

    def _begin_to_beat(self) -> None:
        # Its own words with the store: it must see a call while this thread waits for something.
        threading.Thread(target=self._beat, name="members", daemon=True).start()

    def _agree(
        self, number: int, done: int, expected: Sequence[int], candidate: Candidate | None
    ) -> Epoch:
        """Say that this island is there, and find out with whom it goes on."""
        self._close_transport()
        if self._is_out(self.island):
            raise left_out(self.island)
        members = f"{number}/members"
        self._store.set(f"{number}/{self.island}", str(done))
        self._store.set(f"{number}/called", "")
        present = [i for i in self._await(number, expected, members) if not self._is_out(i)]
        if len(present) == len(expected):  # all live, so who could not connect are apart
            apart = [i for i in present if self._store.check([f"{number - 1}/failed/{i}"])]
            present = [i for i in present if i not in apart[-1:]]
        counts = {i: count_of(self._store.get(f"{number}/{i}")) for i in present}
        mine = json.dumps(self._proposal(counts, candidate))
        found = proposal_of(self._store.compare_set(members, "", mine))
        epoch = epoch_of(number, found)
        if found["ticket"]:
            self.answered = (found["ticket"], epoch.newcomer is not None)
            if epoch.newcomer is not None:
                self.door.let_in(found["ticket"], number)
        agreed = epoch.done
        for island in self.epoch.islands:
            if island not in agreed:
                self._fate.put_out(island, self._life(island))
        if self.island not in agreed:
            raise left_out(self.island, f"islands {_listed(agreed)}")
        if len(agreed) < self.least:
            raise too_few(self.least, agreed)
        return epoch

    def _proposal(self, done: Mapping[int, int], candidate: Candidate | None) -> dict[str, Any]:
        """Who takes part in an epoch, as it lies in the store."""
        lives = {island: self._life(island) for island in done}
        found = {"done": done, "ticket": "", "newcomer": None, "lives": lives}
        if candidate is None:
            return found
        if not self.door.shows_life(candidate, self._pace.silent_s):
            return found | {"ticket": candidate.ticket}
        # As if a call behind: it is given the last one's result, so it knows where they are.
        newcomer, ticket = candidate.island, candidate.ticket
        done, lives = {**done, newcomer: max(done.values()) - 1}, lives | {newcomer: ticket}
        return {"done": done, "ticket": ticket, "newcomer": newcomer, "lives": lives}

    def _await(self, number: int, expected: Sequence[int], members: str) -> list[int]:
        """Those that are there, when all are that live, when somebody has decided, or in the end.

        An island that shows life may be computing. It comes at its next call.
        """
        nap_s, deadline_s = _FIRST_NAP_S, time.monotonic() + self.timeout_s + self._pace.late_s
        while True:
            is_late = time.monotonic() >= deadline_s
            present = [i for i in expected if self._store.check([f"{number}/{i}"])]
            absent = [i for i in expected if i not in present and not self._is_out(i)]
            awaited = [i for i in absent if self._is_alive(i)]
            if not awaited or is_late or self._store.check([members]):
                return present
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _LONGEST_NAP_S)

    def _life(self, island: int) -> str:
        before = self._own_life if island == self.island else ""
        return self.epoch.lives.get(island, before)

    def _is_out(self, island: int) -> bool:
        return self._fate.is_out(island, self._life(island))

    def _is_alive(self, island: int) -> bool:
        """Whether an island has shown life, as far as this one has looked."""
        beat, now_s = self._store.text(f"beat/{island}"), time.monotonic()
        if island not in self._seen or self._seen[island][0] != beat:
            self._seen[island] = (beat, now_s)
        return now_s - self._seen[island][1] < self._pace.silent_s

    def _enter(self, epoch: Epoch) -> None:
        self._close_transport()
        self.epoch = epoch
        self._called.clear()
        self.transport = self._opens(epoch)
        if self.island == epoch.islands[0]:
            self._store.set("now", json.dumps(epoch.islands))

    def _close_transport(self) -> None:
        if self.transport is not None:
            self.transport.close()
            self.transport = None

    def _beat(self) -> None:
        while not self._closed.is_set():
            try:
                self._store.add(f"beat/{self.island}", 1)
                number = self.epoch.number
                for island in self.epoch.islands if self.waits else ():
                    self._is_alive(island)
                if not self.waits:
                    self._seen.clear()  # nobody has looked: what was seen tells nothing
                if self.island in self.epoch.islands[:1]:
                    self.door.look(self.epoch.islands)
                called = self._store.check([f"{number + 1}/called"])
                if called or any(map(self._is_out, self.epoch.islands)):
                    if number == self.epoch.number:
                        self._called.set()
            except TransportError:  # told where the store is needed; it may come back before
                pass
            self._closed.wait(self._pace.beat_s)


def _listed(islands: Any) -> str:
    return ", ".join(str(island) for island in sorted(islands))
