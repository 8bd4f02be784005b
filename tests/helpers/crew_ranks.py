"""Islands as threads on a loopback, of which some may be lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ds_gradprune.wire.crew import CrewTransport
from ds_gradprune.wire.loopback import LoopbackHub
from ds_gradprune.wire.members import Epoch, Members, Pace
from ds_gradprune.wire.transport import Transport

TIMEOUT_S = 1.0
PACE = Pace(beat_s=0.02, silent_s=0.3, late_s=0.5)

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
