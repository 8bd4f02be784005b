"""A process takes the place of a lost rank in a run that goes on; torch's world stands in for it.

No process group of torch takes in a member, and nobody of the run would answer in one. So the
newcomer's world is torch's own `fake` backend: it has the rank and the number of ranks of the run,
and every collective ends at once, as if all had said the same. What must be true of the others is
asked of the run's store, and all that is exchanged goes through the crew (`crew`).
"""

from __future__ import annotations

import importlib
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.errors import TransportError
from ds_gradprune.wire.bounded import STORE_S, Bounded
from ds_gradprune.wire.entries import count_of, islands_of
from ds_gradprune.wire.meeting import meet

FAKE = "fake"
CREW = "ds_gradprune/crew"
"""Before the keys of a run's islands, engine by engine."""

LOOK_S, PROBE_S = 1.6, 1.0
"""Three signs of life of an island; the time that a host takes to let a connection in."""


@dataclass(frozen=True)
class _Inside:
    """The run whose lost rank this process stands in for.

    Attributes:
        store: of the run.
        ticket: of this life of its island.
        ranks: of the island.
    """

    store: Any
    ticket: str
    ranks: tuple[int, ...]


_inside: list[_Inside] = []


def run_that_goes_on(address: str, port: int) -> Any:
    """The store of a run whose islands may be lost, and some of which show life.

    Args:
        address: of its store.
        port: likewise.

    Returns:
        Its keys are those of the first engine's islands. None: there is none.

    Local.
    """
    try:
        socket.create_connection((address, port), PROBE_S).close()
        store = dist.TCPStore(  # type: ignore[attr-defined] # torch
            address,
            port,
            is_master=False,
            timeout=timedelta(seconds=STORE_S),
            wait_for_workers=False,
        )
        end = f"{CREW}/0/now"
        for key in Bounded(store).keys():
            if key.endswith(end):
                inner = dist.PrefixStore(key[: -len("/now")], store)  # type: ignore[attr-defined]
                if _goes_on(Bounded(inner)):
                    return inner
    except (OSError, RuntimeError, TransportError):  # whoever needs the store tells what it is
        return None
    return None


def stand_in(store: Any, rank: int, world_size: int, timeout_s: float) -> None:
    """Open torch's world in the place of a lost rank, which comes with its whole island.

    Args:
        store: what `run_that_goes_on` gave.
        rank: of this process.
        world_size: ranks that the run began with.
        timeout_s: of what torch makes later.

    Raises:
        TransportTimeout: other ranks of its island did not come.

    Collective: the ranks of the island.
    """
    num_shards = count_of(Bounded(store).text("shards") or "1")
    island, shard = divmod(rank, num_shards)
    ticket = meet(Bounded(store), island, shard, num_shards, timeout_s)
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers the backend
    limit = timedelta(seconds=timeout_s)
    # Here the ranks of the island find each other when they make a group.
    world = dist.PrefixStore(f"back/{ticket}", store)  # type: ignore[attr-defined] # torch
    dist.init_process_group(FAKE, store=world, rank=rank, world_size=world_size, timeout=limit)
    ranks = tuple(range(island * num_shards, (island + 1) * num_shards))
    _inside[:] = [_Inside(store, ticket, ranks)]


def first_store() -> Any:
    """The store of the first engine's islands. Local."""
    if _inside:
        return _inside[0].store
    world = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"{CREW}/0", world)  # type: ignore[attr-defined] # torch


def joined_store() -> Any:
    """The store of the run that this process is to join; None: it began with the others."""
    return _inside[0].store if _inside else None


def life() -> str:
    """The ticket of the island that this process comes back with; empty where it is the first."""
    return _inside[0].ticket if _inside else ""


def comrades() -> tuple[int, ...]:
    """The ranks that come back with this process, itself included; empty where it began so."""
    return _inside[0].ranks if _inside else ()


def backend(name: str | None, ranks: Sequence[int]) -> str | None:
    """What a group of ranks over `name` is over in this process; None: as the world."""
    if not _inside:
        return name
    if len(ranks) > 1 and tuple(ranks) != _inside[0].ranks:
        return FAKE
    return name or ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def _goes_on(store: Bounded) -> bool:
    """Whether an island shows life."""
    if store.check(["over"]):
        return False

    def beats() -> list[str]:
        return [store.text(f"beat/{island}") for island in islands_of(store.get("now"))]

    before, deadline_s = beats(), time.monotonic() + LOOK_S
    while beats() == before:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True
