"""Which ranks form an island, and the process groups that follow; an `mpu` for DeepSpeed.

An island is `island.ranks` consecutive ranks, or the ranks of a host. Its *inner* group shares
gradients, optimizer states and norms as in plain DeepSpeed. An *outer* group joins the ranks of the
same index of all islands, which own the same shard.

DeepSpeed asks its mpu two different questions (0.19.8, runtime/config.py, engine.py,
utils/groups.py). Over how many ranks is the *data* spread? All: so train_batch_size, accumulation,
the sample count and the training data's sampler are those of the whole job. With whom are
*gradients* reduced, norms taken, states partitioned? With the inner group.

The group of all is needed as well, for the dense warm-up at stage 0: DeepSpeed looks its groups up
in a global of `utils/groups.py` at every step, so ours stands there only while it is `in_force`,
and other engines of the process never see it.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from ds_gradprune.deepspeed.crowd import warn_of_crowd
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
            UnsupportedError: no launcher has said the local rank, which DeepSpeed needs, too.
        """
        ranks = [os.environ[name] for name in _LOCAL_RANKS if name in os.environ]
        sizes = [os.environ[name] for name in _LOCAL_SIZES if name in os.environ]
        if not ranks:
            raise UnsupportedError(
                "the environment must hold LOCAL_RANK, this rank's number on its host. Start with "
                "deepspeed, torchrun or mpirun, or set it."
            )
        return cls(int(ranks[0]), int(sizes[0]) if sizes else None, socket.gethostname())


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


class Groups:
    """The island of this rank and its process groups; the `mpu` of `deepspeed.initialize`.

    Args:
        ranks: consecutive ranks that form an island; None: the ranks of a host do, or each rank
            alone where there is only one host.

    Attributes:
        island: which island this rank belongs to.
        num_islands: number of islands.
        shard: this rank's index inside its island.
        num_shards: ranks of an island.
        inner: the ranks of this island; None if it has only one.
        inner_cpu: the same over gloo, and ours alone; None as well.
        outer: the ranks of this index on all islands, in the islands' order.
        outer_cpu: the same over gloo, for tensors in the host's memory.
        everyone: the group of all ranks, the same that DeepSpeed without an mpu uses.

    Raises:
        UnsupportedError: see `ranks_per_island`; on all ranks alike.

    Collective: all ranks construct it.
    """

    def __init__(self, ranks: int | None = None) -> None:
        self._rank = dist.get_rank()
        self._world_size = dist.get_world_size()
        seats = _gather(Seat.here())
        self.num_shards = ranks_per_island(seats, ranks)
        if self._rank == 0:
            warn_of_crowd(seats, self.num_shards)
        self.num_islands = self._world_size // self.num_shards
        self.island, self.shard = divmod(self._rank, self.num_shards)
        self.everyone: Any = groups._clone_world_group()
        self._alone = self._mine([[rank] for rank in range(self._world_size)])
        self.inner: Any = None
        self.inner_cpu: Any = None
        if self.num_shards > 1:
            firsts = range(0, self._world_size, self.num_shards)
            inners = [[*range(r, r + self.num_shards)] for r in firsts]
            self.inner = self._mine(inners)
            # DeepSpeed's collectives must never meet our agreements.
            self.inner_cpu = self._mine(inners, backend="gloo")
        outers = [[*range(i, self._world_size, self.num_shards)] for i in range(self.num_shards)]
        self.outer: Any = self._mine(outers)
        is_gloo = dist.get_backend(self.outer) == "gloo"
        self.outer_cpu: Any = self.outer if is_gloo else self._mine(outers, backend="gloo")

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """DeepSpeed's groups are this island's inside. Local."""
        with kept():
            groups.mpu = self
            yield

    @contextmanager
    def writing(self, engine: Any) -> Iterator[None]:
        """Island 0 alone writes DeepSpeed's checkpoint files inside. Local.

        At stages 0 to 2 this already follows from `get_sequence_data_parallel_rank`. At stage 3
        every rank writes a file with the model's states, named by its rank in the inner group.
        """
        before = engine.save_non_zero_checkpoint
        engine.save_non_zero_checkpoint = before and self.island == 0
        try:
            with self.in_force():
                yield
        finally:
            engine.save_non_zero_checkpoint = before

    @contextmanager
    def reading(self, engine: Any) -> Iterator[None]:
        """Every island reads the files that island 0 wrote, by inner rank. Local."""
        assert engine.mpu is self
        with self.in_force():
            yield

    # ---- how the data is spread ----------------------------------------------------------------

    def get_data_parallel_world_size(self) -> int:
        """Ranks that read different data: all."""
        return self._world_size

    def get_data_parallel_rank(self) -> int:
        """Which part of the data this rank reads."""
        return self._rank

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Ranks that read different data."""
        return list(range(self._world_size))

    # ---- with whom a step is shared ------------------------------------------------------------

    def get_data_parallel_group(self) -> Any:
        """With whom gradients are reduced: the island."""
        return self._alone if self.inner is None else self.inner

    def get_sequence_data_parallel_group(self) -> Any:
        """The same, as DeepSpeed calls it where sequences may be split."""
        return self.get_data_parallel_group()

    def get_sequence_data_parallel_world_size(self) -> int:
        """Ranks that share one optimizer's state."""
        return self.num_shards

    def get_sequence_data_parallel_rank(self) -> int:
        """DeepSpeed compares it with 0 and with the inner rank to see who writes its files.

        The rank among all says: island 0 does.
        """
        return self._rank

    # ---- no other parallelism ------------------------------------------------------------------

    def get_model_parallel_group(self) -> Any:
        """Nobody shares a layer."""
        return self._alone

    def get_model_parallel_world_size(self) -> int:
        """Ranks that share a layer."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """Part of a layer on this rank: all of it."""
        return 0

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_pipeline_model_parallel_group = get_model_parallel_group
    get_pipeline_model_parallel_world_size = get_model_parallel_world_size
    get_pipeline_model_parallel_rank = get_model_parallel_rank

    def _mine(self, partition: list[list[int]], **options: Any) -> Any:
        """Create all groups, on all ranks in the same order; the one with this rank in it."""
        created = [dist.new_group(ranks, **options) for ranks in partition]
        return next(g for g, ranks in zip(created, partition, strict=True) if self._rank in ranks)


def _gather(seat: Seat) -> list[Seat]:
    """Every rank's seat, in rank order; nothing is unpickled. Collective: all ranks."""
    device = get_accelerator().current_device_name()
    text = json.dumps([seat.local_rank, seat.local_size, seat.host[:_HOST_CHARS]]).encode("ascii")
    mine = torch.zeros(_SEAT_BYTES, dtype=torch.uint8)
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = [torch.empty_like(mine, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine.to(device))
    return [Seat(*json.loads(row.cpu().numpy().tobytes().rstrip(b"\0"))) for row in rows]


@contextmanager
def kept() -> Iterator[None]:
    """Whatever is done to DeepSpeed's global mpu inside is undone at the end. Local."""
    before = groups.mpu
    try:
        yield
    finally:
        groups.mpu = before
