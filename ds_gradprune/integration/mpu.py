"""The `mpu` of `deepspeed.initialize` that makes every rank an island.

DeepSpeed asks it two different questions (0.19.8, runtime/config.py, engine.py, utils/groups.py).
Over how many ranks is the *data* spread? All: so train_batch_size, accumulation, the sample count
and the training data's sampler are those of the whole job. With whom are *gradients* reduced, norms
taken, states partitioned? With nobody: the group is the rank alone.

The group of all is needed as well, for the dense warm-up: DeepSpeed looks its groups up in a global
of `utils/groups.py` at every step, so ours stands there only while an island steps alone, and other
engines of the process never see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups


class IslandGroups:
    """Every rank a data-parallel group of its own.

    Attributes:
        everyone: the group of all ranks, the same that DeepSpeed without an mpu uses.

    Collective: all ranks construct it.
    """

    def __init__(self) -> None:
        self._rank = dist.get_rank()
        self._world_size = dist.get_world_size()
        alone = [dist.new_group([rank]) for rank in range(self._world_size)]
        self._own = alone[self._rank]
        self.everyone: Any = groups._clone_world_group()

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """DeepSpeed's groups are this island's inside. Local."""
        with kept():
            groups.mpu = self
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
        """With whom gradients are reduced: nobody."""
        return self._own

    def get_sequence_data_parallel_group(self) -> Any:
        """The same, as DeepSpeed calls it where sequences may be split."""
        return self._own

    def get_sequence_data_parallel_world_size(self) -> int:
        """Ranks that share one optimizer's state."""
        return 1

    def get_sequence_data_parallel_rank(self) -> int:
        """DeepSpeed writes its checkpoint files where this is 0: on island 0 only."""
        return self._rank

    # ---- no other parallelism ------------------------------------------------------------------

    def get_model_parallel_group(self) -> Any:
        """Nobody shares a layer."""
        return self._own

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


@contextmanager
def kept() -> Iterator[None]:
    """Whatever is done to DeepSpeed's global mpu inside is undone at the end. Local."""
    before = groups.mpu
    try:
        yield
    finally:
        groups.mpu = before
