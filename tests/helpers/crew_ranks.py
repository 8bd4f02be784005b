"""Islands as threads on a loopback, of which some may be lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ds_gradprune.wire.alike import Alike
from ds_gradprune.wire.bounded import Bounded
from ds_gradprune.wire.crew import CrewTransport
from ds_gradprune.wire.everyone import Everyone
from ds_gradprune.wire.fate import Fate, store_of
from ds_gradprune.wire.loopback import LoopbackHub
from ds_gradprune.wire.members import Epoch, Members, Pace
from ds_gradprune.wire.patient import Patient
from ds_gradprune.wire.transport import Transport

TIMEOUT_S = 1.0
PACE = Pace(beat_s=0.02, silent_s=0.3, late_s=0.5)
PACE_OF_MANY = Pace(beat_s=0.05, silent_s=0.6, late_s=0.5)
"""Six ranks on two cores show life late."""

Wrap = Callable[[Transport, int, int], Transport]


class Hubs:
    """A loopback for every epoch."""

    def __init__(self, wrap: Wrap | None = None) -> None:
        self._hubs: dict[int, LoopbackHub] = {}
        self._lock = threading.Lock()
        self._wrap = wrap

    def opener(self, island: int) -> Callable[[Epoch], Transport]:
        def opens(epoch: Epoch) -> Transport:
            with self._lock:
                hub = self._hubs.setdefault(
                    epoch.number, LoopbackHub(len(epoch.islands), TIMEOUT_S)
                )
            transport: Transport = hub.transport(epoch.islands.index(island))
            return transport if self._wrap is None else self._wrap(transport, island, epoch.number)

        return opens


def on_crew(
    count: int, work: Callable[[CrewTransport], Any], wrap: Wrap | None = None, least: int = 1
) -> list[Any]:
    """What `work` gives, or raises, on a thread for each island."""
    store, hubs = dist.HashStore(), Hubs(wrap)  # type: ignore[attr-defined]
    results: list[Any] = [None] * count

    def main(island: int) -> None:
        members = Members(store, island, hubs.opener(island), TIMEOUT_S, least, PACE)
        members.begin(range(count))
        crew = CrewTransport(members)
        try:
            results[island] = work(crew)
        except BaseException as exc:
            results[island] = exc
        crew.close()

    threads = [threading.Thread(target=main, args=(island,)) for island in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


WrapRank = Callable[[Transport, int, int, int], Transport]
"""A transport, island, shard, epoch."""


class Place:
    """Where islands of several ranks, each a thread, reach each other.

    Args:
        count: islands.
        shards: ranks of each.
        wrap: puts a transport into another one.
        least: with fewer islands the run ends.
    """

    def __init__(
        self, count: int, shards: int, wrap: WrapRank | None = None, least: int = 1
    ) -> None:
        self.store = dist.HashStore()  # type: ignore[attr-defined]
        self._count, self._shards, self._least = count, shards, least
        self._hubs = [Hubs(_of_shard(wrap, shard)) for shard in range(shards)]
        self._inners: dict[tuple[int, str], LoopbackHub] = {}
        self._lock = threading.Lock()

    def rank(self, island: int, shard: int, life: str = "") -> tuple[CrewTransport, Everyone]:
        """One that has begun, or must join."""
        fate = Fate(Bounded(self.store), shard, self._shards)
        own, opener = store_of(self.store, shard), self._hubs[shard].opener(island)
        limits = (TIMEOUT_S, self._least, PACE_OF_MANY)
        members = Members(own, island, opener, *limits, fate=fate, life=life)
        if not life:
            members.begin(range(self._count))
        with self._lock:
            hub = LoopbackHub(self._shards, 20 * TIMEOUT_S)
            hub = self._inners.setdefault((island, life), hub)
        inner = Patient(hub.transport(shard), members)
        crew = CrewTransport(members, Alike(inner, self._count, self._least))
        return crew, Everyone(crew, inner)


def on_islands(
    count: int,
    shards: int,
    work: Callable[[CrewTransport, Everyone], Any],
    wrap: WrapRank | None = None,
    least: int = 1,
) -> list[list[Any]]:
    """What `work` gives, or raises, on a thread for each rank of each island."""
    place = Place(count, shards, wrap, least)
    results: list[list[Any]] = [[None] * shards for _ in range(count)]

    def main(island: int, shard: int) -> None:
        crew, everyone = place.rank(island, shard)
        try:
            results[island][shard] = work(crew, everyone)
        except BaseException as exc:
            results[island][shard] = exc
        crew.close()

    places = [(island, shard) for island in range(count) for shard in range(shards)]
    threads = [threading.Thread(target=main, args=place) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _of_shard(wrap: WrapRank | None, shard: int) -> Wrap | None:
    if wrap is None:
        return None
    return lambda transport, island, epoch: wrap(transport, island, shard, epoch)
