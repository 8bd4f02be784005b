"""Where this process stands among its peers, and the few things all of them must agree on.

Serves torchrun, the deepspeed launcher, mpirun-style launchers and a single plain process alike.
Knows nothing of DeepSpeed. The agreements travel in gloo groups of their own, beside the training's
collectives, so their order never matters to each other.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ds_gradprune.errors import ConfigError, GradPruneError

T = TypeVar("T")

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

_LETTING_GO_S = 0.1
"""A thread of gloo needs microseconds once it has a core and Python's lock."""

_AGREEMENT_TIMEOUT = timedelta(hours=2)
"""One rank may tokenize a large text, or compile, while the others wait in an agreement."""


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


def leave_group() -> None:
    """Leave torch's process group at the end of a process; a second call does nothing. Local.

    A thread of gloo drops the last collective's tensors only after the collective has returned, and
    needs Python's lock for it. One that comes for the lock when the interpreter is already ending
    aborts the process, and its exit code is lost. Destroying the group joins the threads; a group
    that somebody still holds, as DeepSpeed does one, keeps its own, and those get the lock while
    this thread sleeps.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(_LETTING_GO_S)


class AgreedFault(GradPruneError):
    """Some rank failed, and all ranks know; `rank` is the one that should tell the user."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class Peers:
    """All processes of the run. With one process everything is answered at once.

    Args:
        place: of this process. With more than one, torch.distributed must be initialised.

    Collective: all ranks construct it.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.rank = place.rank
        self.world_size = place.world_size
        self._group: Any = None
        if self.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=_AGREEMENT_TIMEOUT)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order. Collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        """The values summed over ranks, in float64; equal on all ranks. Collective."""
        gathered = self.gather(list(values))
        return [sum(column) for column in zip(*gathered, strict=True)]

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank; if it fails on one, it has failed on all. Collective.

        Args:
            work: must not call collectives, because another rank's may have failed before.

        Raises:
            AgreedFault: on all ranks alike, with the message of the first rank that failed.
        """
        result: T | None = None
        fault: str | None = None
        try:
            result = work()
        except GradPruneError as exc:
            fault = str(exc)
        for rank, message in enumerate(self.gather(fault)):
            if message is not None:
                raise AgreedFault(message, rank)
        return result  # type: ignore[return-value] # set where no rank has a fault

    def speaks_first(self) -> bool:
        """True on the first rank that asks, False on all others: who tells of a failure. Local.

        For failures that may have hit one rank alone, where no collective would return. If the
        store is gone, so is rank 0, and everybody may speak.
        """
        if self.world_size == 1:
            return True
        store = dist.distributed_c10d._get_default_store()
        try:
            return bool(store.add("ds_gradprune/told", 1) == 1)
        except RuntimeError:
            return True


class StopSwitch:
    """Ends a run at a step boundary, on all ranks at the same one, when any rank is asked to stop.

    The question travels while the next step computes: `agreed` launches it and answers the one of
    the step before. So a stop comes one step late and costs no waiting.

    Args:
        peers: the ranks that must agree.

    Collective: all ranks construct it.
    """

    def __init__(self, peers: Peers) -> None:
        self.requested = False
        self._world_size = peers.world_size
        self._group: Any = None
        self._asked: tuple[torch.Tensor, Any] | None = None
        if self._world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=_AGREEMENT_TIMEOUT)

    def listen(self) -> None:
        """Take SIGINT and SIGTERM as requests. A second SIGINT interrupts at once. Local."""
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def agreed(self) -> bool:
        """True on all ranks once any rank was asked to stop. Call once per step. Collective."""
        if self._world_size == 1:
            return self.requested
        if self._answer():
            return True
        flag = torch.tensor([int(self.requested)], dtype=torch.int32)
        self._asked = (flag, dist.all_reduce(flag, group=self._group, async_op=True))
        return False

    def close(self) -> None:
        """Let the last question arrive, before the process group goes. Collective."""
        self._answer()

    def _answer(self) -> bool:
        if self._asked is None:
            return False
        flag, work = self._asked
        work.wait()
        self._asked = None
        return bool(flag.item())

    def _on_signal(self, number: int, _frame: object) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ[name]
    if not value.isdecimal():
        raise ConfigError(f"{name} must be a whole number, got {value!r}.")
    return int(value)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
