"""Ideas for update mode that the product does not have, behind the product's own seams.

What is found to be worth it moves into the product; the rest is deleted, and told in LOG.md.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from ds_gradprune.bucket.apply import scatter_add
from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.train.kept import KeptResidual


class Counted:
    """An outer rule: the scale of an element's mean depends on how many islands have sent it.

    With c of N islands the scale is `lone` for c = 1 and `full` for c = N, and between them a line
    over logarithms. The exchange's own scale must be `full`.

    Args:
        islands: N.
        lone: see above.
        full: see above.
    """

    nbytes = 0

    def __init__(self, islands: int, lone: float, full: float) -> None:
        place = [math.log(count) / math.log(islands) for count in range(1, islands + 1)]
        self._gains = torch.tensor([0.0] + [(lone / full) ** (1 - t) - 1 for t in place])
        self._sum = self._count = torch.zeros(0)

    def begin(self, index: int, store: torch.Tensor, start: int, stop: int) -> None:
        """See `OuterRule`."""
        self._sum, self._count = store.new_zeros(stop - start), store.new_zeros(stop - start)

    def note(self, block: SparseBlock, factor: float) -> None:
        """See `OuterRule`."""
        scatter_add(self._sum, block, factor)
        ones = dataclasses.replace(
            block, values=torch.ones_like(block.values), dense=torch.ones_like(block.dense)
        )
        scatter_add(self._count, ones)

    def note_dense(self, move: torch.Tensor) -> None:
        """See `OuterRule`: everybody has sent everything."""

    def drift(self) -> torch.Tensor | None:
        """See `OuterRule`."""
        return self._sum * self._gains.to(self._sum.device)[self._count.long()]

    def reset(self) -> None:
        """See `OuterRule`."""

    def state_dict(self) -> Any:
        """See `OuterRule`: there is none."""
        return None

    def read(self, state: Any) -> Any:
        """See `OuterRule`."""
        return state

    def take(self, state: Any) -> None:
        """See `OuterRule`."""


@torch.no_grad()
def let_see(own: torch.Tensor, kept: KeptResidual, bound: float) -> None:
    """Let own weights act on a part of the residual: at most `bound` of every element.

    What they see leaves the residual, so it is counted once in what is selected from next.

    Args:
        own: (numel,) one island's weights, equal to the shared ones.
        kept: its residual, in one store.
        bound: in units of a weight.
    """
    (store,) = kept.state_dict()
    seen = (store * kept.decay).clamp_(-bound, bound)
    own.add_(seen)
    store.sub_(seen, alpha=1 / kept.decay)
