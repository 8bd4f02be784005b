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

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups

from ds_gradprune.deepspeed.crowd import warn_of_crowd
from ds_gradprune.deepspeed.seats import Seat, gather_seats, ranks_per_island
from ds_gradprune.deepspeed.waits import everyone, new_group
from ds_gradprune.wire.stand_in import FAKE, comrades

_given_up: list[Any] = []
"""Groups of engines that were detached."""


class Groups:
    """The island of this rank and its process groups; the `mpu` of `deepspeed.initialize`.

    Args:
        ranks: consecutive ranks that form an island; None: the ranks of a host do, or each rank
            alone where there is only one host.
        timeout_s: longest wait in them; None: torch's own.

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

    def __init__(self, ranks: int | None = None, timeout_s: float | None = None) -> None:
        self._created: list[Any] = []
        self._timeout_s = timeout_s
        self._rank = dist.get_rank()
        self._world_size = dist.get_world_size()
        self.num_shards = len(comrades())  # of an island that comes back
        if not self.num_shards:
            seats = gather_seats(Seat.here())
            while _given_up:  # nobody is in a collective of theirs any more
                with suppress(ValueError):  # somebody has destroyed all groups meanwhile
                    dist.destroy_process_group(_given_up.pop())
            self.num_shards = ranks_per_island(seats, ranks)
            if self._rank == 0:
                warn_of_crowd(seats, self.num_shards)
        self.num_islands = self._world_size // self.num_shards
        self.island, self.shard = divmod(self._rank, self.num_shards)
        self.everyone: Any = everyone(timeout_s)
        self._alone = self._mine([[rank] for rank in range(self._world_size)])
        self.inner: Any = None
        self.inner_cpu: Any = None
        firsts = range(0, self._world_size, self.num_shards)
        self._inners = [[*range(r, r + self.num_shards)] for r in firsts]
        if self.num_shards > 1:
            self.inner = self._mine(self._inners)
            # DeepSpeed's collectives must never meet our agreements.
            self.inner_cpu = self._mine(self._inners, backend="gloo")
        outers = [[*range(i, self._world_size, self.num_shards)] for i in range(self.num_shards)]
        self.outer: Any = self._mine(outers)
        is_gloo = dist.get_backend(self.outer) in ("gloo", FAKE)
        self.outer_cpu: Any = self.outer if is_gloo else self._mine(outers, backend="gloo")

    def new_inner(self, timeout_s: float) -> Any:
        """One more group of the ranks of this island, over gloo. Collective: all ranks.

        Args:
            timeout_s: longest wait in it.
        """
        before, self._timeout_s = self._timeout_s, timeout_s
        try:
            return self._mine(self._inners, backend="gloo")
        finally:
            self._timeout_s = before

    def close(self, *, is_mpu: bool) -> None:
        """Give up the groups: their connections and threads. A second call does nothing. Local.

        They are destroyed when the next ones are made and all ranks have come there. Now another
        rank may still be in their last collective, or even connect to them.

        Args:
            is_mpu: an engine goes on with what DeepSpeed takes from an mpu, which stays.
        """
        kept = [self._alone, self.inner] if is_mpu else []
        _given_up.extend(g for g in self._created if not any(g is other for other in kept))
        self._created = []

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """DeepSpeed's groups are this island's inside. Local."""
        with kept():
            groups.mpu = self
            yield

    @contextmanager
    def writing(self, engine: Any, writes: bool) -> Iterator[None]:
        """This rank writes DeepSpeed's checkpoint files inside, as one of island 0 would. Local.

        At stage 0 the first rank writes the model, at stages 1 and 2 each rank its partition as
        well. At stage 3 each rank writes its part of both, named by its rank in the inner group.

        Args:
            engine: whose mpu this is.
            writes: False: it writes nothing.
        """
        before = engine.save_non_zero_checkpoint, engine.save_zero_checkpoint
        has_all = self.shard == 0 or bool(engine.zero_optimization_partition_weights())
        engine.save_non_zero_checkpoint = writes and has_all
        engine.save_zero_checkpoint = writes and hasattr(engine.optimizer, "dp_process_group")
        try:
            with self.in_force():
                yield
        finally:
            engine.save_non_zero_checkpoint, engine.save_zero_checkpoint = before

    @contextmanager
    def reading(self, engine: Any) -> Iterator[None]:
        """Every rank reads the files of its inner rank on its disk. Local."""
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

        The rank among all says: island 0 does. `writing` says it anew for each disk.
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
        created = [new_group(ranks, self._timeout_s, **options) for ranks in partition]
        mine = next(g for g, ranks in zip(created, partition, strict=True) if self._rank in ranks)
        self._created.append(mine)
        return mine


@contextmanager
def kept() -> Iterator[None]:
    """Whatever is done to DeepSpeed's global mpu inside is undone at the end. Local."""
    before = groups.mpu
    try:
        yield
    finally:
        groups.mpu = before
