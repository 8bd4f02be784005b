"""Where this process stands among all: rank, host, and what torch and DeepSpeed want to be told.

Serves torchrun, DeepSpeed's launcher, mpirun-style launchers and a single plain process alike.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch

from ds_gradprune.errors import ConfigError

# rank, world size, local rank, local world size; the first two decide whether a launcher was there.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",)),
)


@dataclass(frozen=True, slots=True)
class Place:
    """One process among all.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: processes in all.
        local_rank: 0 .. local_world_size - 1, among the processes of this host.
        local_world_size: processes on this host.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def find_place(environ: Mapping[str, str]) -> Place:
    """Read the place from the variables a launcher left. Local, pure.

    Raises:
        ConfigError: a launcher's variables are incomplete or contradict each other.
    """
    for rank, world, local_rank, local_world in _LAUNCHERS:
        if rank not in environ or world not in environ:
            continue
        world_size = _number(environ, world)
        size_name = next((name for name in local_world if name in environ), None)
        if local_rank not in environ and world_size > 1:
            raise ConfigError(
                f"{local_rank} must be set beside {rank} and {world}. Launch with deepspeed, "
                "torchrun or mpirun, or set it to this process's number on its host."
            )
        place = Place(
            _number(environ, rank),
            world_size,
            _number(environ, local_rank) if local_rank in environ else 0,
            _number(environ, size_name) if size_name else world_size,
        )
        if not (place.rank < place.world_size and place.local_rank < place.local_world_size):
            raise ConfigError(
                f"{rank} and {local_rank} must be below {world} and the number of processes on "
                f"this host, got {place.rank} of {place.world_size} and {place.local_rank} of "
                f"{place.local_world_size}."
            )
        return place
    return Place()


def export_place(place: Place, environ: MutableMapping[str, str]) -> None:
    """Write the place under the names that torch and DeepSpeed read. Local.

    A plain process gets a free port. Processes that mpirun started on one host meet at 127.0.0.1;
    on several hosts the user must say where.

    Raises:
        ConfigError: several hosts and no MASTER_ADDR.
    """
    several_hosts = place.local_world_size < place.world_size
    if several_hosts and "MASTER_ADDR" not in environ:
        raise ConfigError(
            "MASTER_ADDR must be set to the address of rank 0's host when the processes run on "
            "several hosts. With Open MPI: mpirun -x MASTER_ADDR=host0 ..."
        )
    environ["RANK"] = str(place.rank)
    environ["WORLD_SIZE"] = str(place.world_size)
    environ["LOCAL_RANK"] = str(place.local_rank)
    environ.setdefault("MASTER_ADDR", "127.0.0.1")
    environ.setdefault("MASTER_PORT", str(_free_port()) if place.world_size == 1 else "29500")


def share_cores(place: Place, environ: MutableMapping[str, str]) -> None:
    """Give each process of this host its part of the cores. Local.

    A user's own OMP_NUM_THREADS stays. torch has read that variable already, so it is told, too.
    """
    if "OMP_NUM_THREADS" in environ:
        return
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    threads = max(1, cores // place.local_world_size)
    environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ[name]
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise ConfigError(f"{name} must be a whole number, got {value[:40]!r}.")
    return int(value)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
