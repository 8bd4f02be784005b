"""Which islands take part: an epoch is a set of islands with a transport of its own.

No process group of torch can lose a member. So when an exchange has failed, the islands that answer
within `answer_s` agree on the next epoch and open a new transport among them::

    regroup(step)       set   epoch/island = committed step       I am here
                        wait  for all islands of the epoch, or until the time is up
                        compare_set  epoch/members               the first proposal holds for all
                        open the epoch's transport

An island that was too late finds itself left out. It asks in, and the others let it in between two
exchanges, at a step that is the same on all of them. What islands have beyond the shared weights is
theirs and waits with them (`train.catch_up` brings those up to date that were away).

The store must outlive the islands. Where an island keeps it, that one cannot be left out, so it
wants a process of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_gradprune.errors import TransportError, TransportTimeout
from ds_gradprune.wire.transport import Transport

NEVER = -1
"""Committed step of an island that joins."""

_FIRST_NAP_S, _LONGEST_NAP_S = 0.005, 0.25


class LeftOut(TransportError):
    """The others go on without this island; it may ask in."""


@dataclass(frozen=True)
class Epoch:
    """A set of islands.

    Attributes:
        number: from 0.
        islands: who takes part, rising.
        steps: island -> the last step whose exchange it has applied; NEVER: it joins.
    """

    number: int
    islands: tuple[int, ...]
    steps: Mapping[int, int]

    @property
    def is_even(self) -> bool:
        """All have applied the same exchanges."""
        return len(set(self.steps.values())) == 1


@dataclass(frozen=True)
class Clock:
    """Time, so that tests can do without waiting."""

    now_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Members:
    """One island's view of who takes part.

    Args:
        store: a store of torch.distributed that all islands reach.
        island: this one; a number of its own for the whole run.
        opens: makes this island's end of an epoch's transport. Collective: the epoch's islands.
        answer_s: so long islands have to say that they are there; longer than the time-out of an
            exchange, which some notice later than others.
        least: with fewer islands the run ends.
        clock: where time comes from.

    Attributes:
        island: see there.
        epoch: the current one; None: this island takes part in none.
        transport: of the epoch; None as well.
    """

    def __init__(
        self,
        store: Any,
        island: int,
        opens: Callable[[Epoch], Transport],
        answer_s: float,
        least: int = 1,
        clock: Clock | None = None,
    ) -> None:
        self.island = island
        self.epoch: Epoch | None = None
        self.transport: Transport | None = None
        self._store = store
        self._opens = opens
        self._answer_s = answer_s
        self._least = least
        self._clock = clock or Clock()

    def begin(self, islands: Sequence[int], step: int = 0) -> Epoch:
        """The first epoch, which all were started with. Collective: these islands."""
        return self._enter(Epoch(0, tuple(sorted(islands)), dict.fromkeys(islands, step)))

    def regroup(self, step: int, invited: Sequence[int] = ()) -> Epoch:
        """Go on with those that answer, after an exchange failed or to let islands in.

        Args:
            step: the last step whose exchange this island has applied.
            invited: islands to let in; equal on all that call it for their sake.

        Returns:
            The next epoch. Where it is not even, those that are behind must catch up.

        Raises:
            LeftOut: the others have gone on without this island.
            TransportTimeout: fewer than `least` answered.

        Collective: the islands of the epoch that are alive.
        """
        assert self.epoch is not None
        expected = sorted({*self.epoch.islands, *invited})
        number = self.epoch.number + 1
        while True:
            epoch = self._agree(number, step, expected)
            try:
                return self._enter(epoch)
            except TransportError:  # one more was lost while the transport was made
                expected, number = list(epoch.islands), number + 1

    def plan(self, step: int) -> None:
        """Before the exchange of a step at which islands may be let in. Local."""
        assert self.epoch is not None
        if self.island == self.epoch.islands[0]:
            known = json.loads(self._get("known", "[]"))
            wishes = [
                island
                for island in known
                if island not in self.epoch.islands and self._store.check([f"wish/{island}"])
            ]
            self._store.set(f"{self.epoch.number}/plan/{step}", json.dumps(wishes))

    def invited(self, step: int) -> list[int]:
        """After that exchange was applied: who is let in now, equal on all. Local."""
        assert self.epoch is not None
        # Without a plan the epoch has begun in this very step, after the last one failed.
        wishes: list[int] = json.loads(self._get(f"{self.epoch.number}/plan/{step}", "[]"))
        for island in wishes:
            self._store.set(f"{self.epoch.number + 1}/invited/{island}", "")
        return wishes

    def ask_in(self, limit_s: float) -> Epoch:
        """Wait until the others let this island in; it is behind them then.

        Raises:
            TransportTimeout: they have not, within `limit_s`.
        """
        self._make_known()
        self._store.set(f"wish/{self.island}", "")
        deadline_s, nap_s = self._clock.now_s() + limit_s, _FIRST_NAP_S
        while self._clock.now_s() < deadline_s:
            number = int(self._get("epoch", "0")) + 1
            if self._store.check([f"{number}/invited/{self.island}"]):
                self._store.delete_key(f"wish/{self.island}")
                try:
                    return self._enter(self._agree(number, NEVER, None))
                except TransportError:  # they went on without it: ask again
                    self._store.set(f"wish/{self.island}", "")
            self._clock.sleep(nap_s)
            nap_s = min(2 * nap_s, _LONGEST_NAP_S)
        self._store.delete_key(f"wish/{self.island}")
        raise TransportTimeout(
            f"island {self.island} must be let in within {limit_s:g} s, but the others have not: "
            "none of them is left, or none exchanges."
        )

    def close(self) -> None:
        """Take part no more. Local."""
        if self.transport is not None:
            self.transport.close()
        self.transport = self.epoch = None

    # ---- details -------------------------------------------------------------------------------

    def _agree(self, number: int, step: int, expected: Sequence[int] | None) -> Epoch:
        """Say that this island is there, and find out with whom it goes on.

        Args:
            number: of the next epoch.
            step: see `regroup`.
            expected: who may answer; None: others decide.
        """
        self.close_transport()
        self._store.set(f"{number}/{self.island}", str(step))
        members = f"{number}/members"
        present = self._await(number, expected or (), members)
        if expected is not None:
            steps = {i: int(self._store.get(f"{number}/{i}")) for i in present}
            found = self._store.compare_set(members, "", json.dumps(steps))
        elif self._store.check([members]):
            found = self._store.get(members)
        else:
            raise LeftOut(f"nobody has gone on to epoch {number} with island {self.island}.")
        agreed = {int(island): int(done) for island, done in json.loads(found).items()}
        if self.island not in agreed:
            raise LeftOut(
                f"islands {', '.join(map(str, agreed))} go on without island {self.island}: it did "
                f"not answer within {self._answer_s:g} s."
            )
        if len(agreed) < self._least:
            raise TransportTimeout(
                f"gradient_pruning.min_islands {self._least} must answer within "
                f"{self._answer_s:g} s, but only islands {', '.join(map(str, agreed))} did."
            )
        return Epoch(number, tuple(sorted(agreed)), agreed)

    def _await(self, number: int, expected: Sequence[int], members: str) -> list[int]:
        """Those that are there, when all are, when somebody has decided, or when time is up."""
        deadline_s, nap_s = self._clock.now_s() + self._answer_s, _FIRST_NAP_S
        while True:
            late = self._clock.now_s() >= deadline_s
            present = [i for i in expected if self._store.check([f"{number}/{i}"])]
            complete = bool(expected) and len(present) == len(expected)
            if late or complete or self._store.check([members]):
                return present
            self._clock.sleep(nap_s)
            nap_s = min(2 * nap_s, _LONGEST_NAP_S)

    def _enter(self, epoch: Epoch) -> Epoch:
        self.close_transport()
        self.transport = self._opens(epoch)
        self.epoch = epoch
        self._make_known()
        if self.island == epoch.islands[0]:
            self._store.set("epoch", str(epoch.number))
        return epoch

    def close_transport(self) -> None:
        """The epoch's transport has failed, or is over. Local."""
        if self.transport is not None:
            self.transport.close()
            self.transport = None

    def _make_known(self) -> None:
        """Add this island to the list of those that may ask in."""
        text = self._get("known", "[]")
        while self.island not in json.loads(text):
            wanted = json.dumps(sorted({*json.loads(text), self.island}))
            expected = text if self._store.check(["known"]) else ""
            text = self._store.compare_set("known", expected, wanted).decode()

    def _get(self, key: str, default: str) -> str:
        found: str = self._store.get(key).decode() if self._store.check([key]) else default
        return found
