"""A residual kept aside: progress that was not sent does not act on the own weights.

With `"residual": "reset"` an island's own weights begin every round as the shared ones, and what it
has not sent waits in a buffer that decays (SparseLoCo, Sarfi et al. 2025, arXiv 2508.15706)::

    a = (own - shared) + decay * kept        what is selected from
    kept = a - sent
    own = shared                             after the shared weights have moved

It costs 4 more bytes per parameter. All functions are local.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ds_gradprune.bucket.apply import scatter_add
from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.errors import CheckpointError
from ds_gradprune.train.shared_weights import Bound


class KeptResidual:
    """One residual per store of shared weights.

    Args:
        decay: what is left of it after an exchange, in (0, 1].

    Attributes:
        decay: see there.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._stores: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(4 * store.numel() for store in self._stores)

    def norm(self) -> float:
        """2-norm over everything owed."""
        return math.sqrt(math.fsum(float(store.norm()) ** 2 for store in self._stores))

    def of(self, bound: Bound, store: torch.Tensor) -> torch.Tensor:
        """(numel,) fp32, a view of what is kept of a bucket, beside the own weights.

        Args:
            bound: the bucket.
            store: the shared weights that it lies in.
        """
        while len(self._stores) <= bound.store:
            self._stores.append(torch.zeros(0))
        device = bound.own[0].device
        kept = self._stores[bound.store]
        if kept.shape != store.shape:
            kept = self._stores[bound.store] = torch.zeros(store.shape, device=device)
        elif kept.device != device:
            kept = self._stores[bound.store] = kept.to(device)
        return kept[bound.start : bound.stop]

    @torch.no_grad()
    def gather(
        self,
        kept: torch.Tensor,
        bound: Bound,
        own: Sequence[torch.Tensor],
        shared: torch.Tensor,
    ) -> None:
        """Take in the round: kept = (own - shared) + decay * kept, as it was selected from.

        Args:
            kept: what `of` gave for the bucket.
            bound: the bucket.
            own: its own weights as they were selected from, one per segment.
            shared: (numel,) its shared weights as they were then.
        """
        kept.mul_(self.decay)
        parts = zip(own, bound.split(shared), bound.split(kept), strict=True)
        for weights, before, part in parts:
            part.copy_(torch.sub(weights, before).add_(part))

    def sent(self, kept: torch.Tensor, block: SparseBlock) -> None:
        """What was sent is not owed any more."""
        scatter_add(kept, block, -1.0)

    def reset(self) -> None:
        """Nothing is owed."""
        for store in self._stores:
            store.zero_()

    def state_dict(self) -> list[torch.Tensor]:
        """What is kept, store after store."""
        return self._stores

    def read(self, state: Any) -> Sequence[torch.Tensor]:
        """Check what `state_dict` gave; changes nothing.

        Raises:
            CheckpointError: it is no such state.
        """
        if not isinstance(state, list) or not all(isinstance(t, torch.Tensor) for t in state):
            raise CheckpointError(
                "the pruning state's kept residual must be a list of tensors, got "
                f"{type(state).__name__}. Resume with the residual and sync_every that saved it."
            )
        return state

    def take(self, state: Sequence[torch.Tensor]) -> None:
        """Continue from what `read` returned."""
        self._stores = [store.detach().clone() for store in state]
