"""One process per rank: two runs that share a port, or two hosts with one number, are told."""

from __future__ import annotations

import os
from typing import Any

from ds_gradprune.errors import TransportError

from .place import Place

PREFIX = "ds_gradprune/seat"


def take_seat(store: Any, place: Place, host: str, attempt: str) -> None:
    """Make sure that no other process takes itself for this rank. Local.

    Where two runs share a port, the ranks of the second one meet rank 0 of the first.

    Args:
        store: of all ranks.
        place: of this process.
        host: name of this process's host.
        attempt: what tells a start from the one before it, where the store outlives both.

    Raises:
        TransportError: another process is this rank, or counts other ranks.
    """
    mine = f"process {os.getpid()} on {host}"
    found = store.compare_set(f"{PREFIX}/{attempt}/{place.rank}", "", mine).decode()
    if found != mine:
        raise TransportError(
            f"rank {place.rank} must be one process, but {found} is it, too, says {mine}. Two runs "
            "share a port, or two hosts were given one number: say --master_port, or --node_rank."
        )
    size = str(place.world_size)
    first = store.compare_set(f"{PREFIX}/{attempt}/world_size", "", size).decode()
    if first != size:
        raise TransportError(
            f"all ranks must count the same ranks, but rank {place.rank} on {host} counts {size}, "
            f"and another one {first}. Start all with the same hostfile, and two runs with two "
            "ports (--master_port)."
        )
