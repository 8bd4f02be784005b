"""The backend registered in deepspeed.comm: DeepSpeed's own, with gradient buckets taken out.

`deepspeed.comm.comm.cdb` is the object that every collective of DeepSpeed goes through (deepspeed
0.19.8, comm/comm.py). Ours subclasses `TorchBackend` and shares its state, so all collectives pass
unchanged; only the one reduction inside `gradient_bucket()` goes to the reducer. DeepSpeed's
comms_logger sits above the backend and keeps seeing every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.comm import comm as deepspeed_comm
from deepspeed.comm.torch import TorchBackend

from ds_gradprune.errors import UnsupportedError

Reduce = Callable[[torch.Tensor], None]


class PruningBackend(TorchBackend):
    """A `TorchBackend` whose marked reduction is done by us."""

    # Own attributes live in slots: __dict__ is the adopted backend's and stays DeepSpeed's alone.
    __slots__ = ("_adopted", "_alone", "_inside", "_reduce", "_users")

    def __init__(self, adopted: TorchBackend) -> None:
        # No super().__init__: it would open a second process group and build its ops again.
        object.__setattr__(self, "__dict__", adopted.__dict__)
        self._adopted = adopted
        self._reduce: Reduce | None = None
        self._users = 0
        self._alone: Any = None
        self._inside: Any = None

    @contextmanager
    def gradient_bucket(self, reduce: Reduce) -> Iterator[None]:
        """Hand the next all-reduce, or reduce to one rank, to `reduce`.

        Args:
            reduce: replaces its argument by the sum over peers, in place, on every rank.

        Raises:
            UnsupportedError: the block ended without a reduction.
        """
        self._reduce = reduce
        try:
            yield
            if self._reduce is not None:
                raise UnsupportedError(
                    "DeepSpeed reduced a gradient bucket without calling all_reduce or reduce; "
                    "this is not the DeepSpeed that gradient pruning was tested with"
                )
        finally:
            self._reduce = None

    @contextmanager
    def alone(self, everyone: Any, inside: Any = None) -> Iterator[None]:
        """Nothing inside waits for all ranks, as some may be gone: all are taken to say the same.

        DeepSpeed 0.19.8 meets all ranks in a save and in a load, to compare the tag, which they
        have agreed on before, and to wait for files. Where it clips equal gradients it sums a
        share of the norm over all ranks (runtime/utils.py, clip_grad_norm_).

        Args:
            everyone: the group of all ranks, beside torch's own.
            inside: the ranks of this island, which are lost together and wait for each other's
                files; None: there is one.
        """
        self._alone, self._inside = everyone, inside
        try:
            yield
        finally:
            self._alone = self._inside = None

    def barrier(self, group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        """`TorchBackend.barrier`; inside `alone` all ranks are the island's. Collective: these."""
        if self._is_alone(group):
            if self._inside is None:
                return None
            group = self._inside
        return super().barrier(group, async_op, device_ids)

    def all_reduce(
        self,
        tensor: torch.Tensor,
        op: Any = torch.distributed.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        """Reduce a marked gradient bucket ourselves; anything else is `TorchBackend.all_reduce`.

        Collective: all ranks of the group.
        """
        reduce, self._reduce = self._reduce, None
        if reduce is None:
            if not self._is_alone(group):
                return super().all_reduce(tensor, op, group, async_op)
            if op == torch.distributed.ReduceOp.SUM:
                tensor.mul_(torch.distributed.get_world_size(group))
            return None
        reduce(tensor)
        return None

    def _is_alone(self, group: Any) -> bool:
        """Whether a collective of a group must not wait, see `alone`."""
        everyone = (None, torch.distributed.GroupMember.WORLD, self._alone)
        return self._alone is not None and any(group is one for one in everyone)

    def reduce(
        self,
        tensor: torch.Tensor,
        dst: int,
        op: Any = torch.distributed.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        """As `all_reduce`; a marked bucket is summed on every rank, not on `dst` alone.

        Collective: all ranks of the group.
        """
        reduce, self._reduce = self._reduce, None
        if reduce is None:
            return super().reduce(tensor, dst, op, group, async_op)
        reduce(tensor)
        return None


def install() -> PruningBackend:
    """Put our backend in the place of DeepSpeed's current one; count the users. Local.

    Raises:
        UnsupportedError: the current backend is none that we can stand in for.
    """
    current = deepspeed_comm.cdb
    if not isinstance(current, PruningBackend):
        if type(current) is not TorchBackend:
            raise UnsupportedError(
                f"deepspeed.comm's backend must be TorchBackend, got {type(current).__name__}"
            )
        current = PruningBackend(current)
        deepspeed_comm.cdb = current
    current._users += 1
    return current


def uninstall(backend: PruningBackend) -> None:
    """One user less; the last one gives DeepSpeed its own backend back. Local."""
    backend._users -= 1
    if backend._users == 0 and deepspeed_comm.cdb is backend:
        deepspeed_comm.cdb = backend._adopted
