"""Where ranks run, as their launcher says, and which of them form an island."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ds_gradprune.errors import UnsupportedError

_FIELD = "gradient_pruning.island.ranks"
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
_LOCAL_SIZES = (
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
)
"""Where deepspeed's launcher, torchrun, Open MPI and MPICH say how many ranks a host has.

Accelerate sets `LOCAL_WORLD_SIZE` to 1 on CPUs (state.py, 1.15.0): DeepSpeed comes first.
"""

_HOST_CHARS = 32
_SEAT_BYTES = 256
"""Room for a seat as JSON, with every character of the host's name escaped."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a rank runs, as its launcher says.

    Attributes:
        local_rank: its number on its host.
        local_size: ranks of its host; None: the launcher does not say.
        host: the host's name, for messages only: two hosts may have the same.
    """

    local_rank: int
    local_size: int | None
    host: str

    @classmethod
    def here(cls) -> Seat:
        """This process's seat. Local.

        Raises:
            UnsupportedError: no launcher has said the local rank, which DeepSpeed needs, too; or
                what it has said is no number.
        """
        ranks = [_number(name) for name in _LOCAL_RANKS if name in os.environ]
        sizes = [_number(name) for name in _LOCAL_SIZES if name in os.environ]
        if not ranks:
            raise UnsupportedError(
                "the environment must hold LOCAL_RANK, this rank's number on its host. Start with "
                "deepspeed, torchrun or mpirun, or set it."
            )
        return cls(ranks[0], sizes[0] if sizes else None, socket.gethostname())


def _number(name: str) -> int:
    """A variable of the environment that is a small whole number."""
    value = os.environ[name]
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise UnsupportedError(f"{name} must be a whole number, got {value[:40]!r}. Set it.")
    return int(value)


def ranks_per_island(seats: Sequence[Seat], ranks: int | None) -> int:
    """How many consecutive ranks form an island. Local.

    Args:
        seats: one per rank, in rank order.
        ranks: `island.ranks`; None: the ranks of a host, or each rank alone on a single host.

    Raises:
        UnsupportedError: islands would have different sizes, or a host's ranks are scattered.
    """
    world_size = len(seats)
    if ranks is not None:
        if world_size % ranks:
            raise UnsupportedError(
                f"{_FIELD} must divide the number of ranks, got {ranks} for {world_size} ranks. "
                "Set a divisor, or null for one island per host."
            )
        return ranks
    hosts = _hosts(seats)
    counts = ", ".join(
        f"{host[0].host} ({len(host)} rank{'s' if len(host) > 1 else ''})" for host in hosts
    )
    wrong = [s for host in hosts for s in host if s.local_size not in (None, len(host))]
    if wrong:
        raise UnsupportedError(
            f"the launcher says that {wrong[0].host} has {wrong[0].local_size} ranks, but local "
            f"ranks say {counts}. Let the launcher fill one host after the other, or set {_FIELD}."
        )
    if len({len(host) for host in hosts}) > 1:
        raise UnsupportedError(
            f"islands must have equally many ranks, got {counts}. Start equally many ranks on "
            f"every host, or set {_FIELD} to 1."
        )
    # On one host alone there is no slow link to spare, and islands are wanted for trying out.
    return len(hosts[0]) if len(hosts) > 1 else 1


def _hosts(seats: Sequence[Seat]) -> list[list[Seat]]:
    """The seats, host by host: a host begins where the local rank is 0."""
    hosts: list[list[Seat]] = []
    for rank, seat in enumerate(seats):
        if seat.local_rank == 0:
            hosts.append([])
        if not hosts or seat.local_rank != len(hosts[-1]):
            raise UnsupportedError(
                "islands need the ranks of a host to follow each other, but rank "
                f"{rank} on {seat.host} has local rank {seat.local_rank}. Let the launcher fill "
                f"one host after the other, or set {_FIELD}."
            )
        hosts[-1].append(seat)
    return hosts


def gather_seats(seat: Seat) -> list[Seat]:
    """Every rank's seat, in rank order; nothing is unpickled. Collective: all ranks."""
    device = get_accelerator().current_device_name()
    text = json.dumps([seat.local_rank, seat.local_size, seat.host[:_HOST_CHARS]]).encode("ascii")
    mine = torch.zeros(_SEAT_BYTES, dtype=torch.uint8)
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = [torch.empty_like(mine, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine.to(device))
    return [Seat(*json.loads(row.cpu().numpy().tobytes().rstrip(b"\0"))) for row in rows]
