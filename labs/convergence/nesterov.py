"""Nesterov's momentum as an outer rule of the product: DiLoCo's."""

from __future__ import annotations

from typing import Any

import torch

from ds_gradprune.bucket.apply import scatter_add
from ds_gradprune.bucket.block import SparseBlock


class Nesterov:
    """Moves the shared weights by `move + momentum * velocity`, velocity with the move in it.

    `torch.optim.SGD(nesterov=True)` with the mean update as its negative gradient. The learning
    rate is the exchange's scale, so it is in `move` already. A residual must be kept apart: the own
    weights follow the shared ones.

    Args:
        momentum: decay of the velocity per exchange, in [0, 1).
    """

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._velocities: dict[int, torch.Tensor] = {}
        self._current = torch.zeros(0)

    @property
    def nbytes(self) -> int:
        """See `OuterRule`."""
        return sum(4 * velocity.numel() for velocity in self._velocities.values())

    def begin(self, index: int, store: torch.Tensor, start: int, stop: int) -> None:
        """See `OuterRule`."""
        if index not in self._velocities:
            self._velocities[index] = torch.zeros_like(store)
        self._current = self._velocities[index][start:stop].mul_(self._momentum)

    def note(self, block: SparseBlock, factor: float) -> None:
        """See `OuterRule`."""
        scatter_add(self._current, block, factor)

    def note_dense(self, move: torch.Tensor) -> None:
        """See `OuterRule`."""
        self._current.add_(move)

    def drift(self) -> torch.Tensor | None:
        """See `OuterRule`."""
        return self._current * self._momentum

    def reset(self) -> None:
        """See `OuterRule`."""
        self._velocities.clear()

    def state_dict(self) -> Any:
        """See `OuterRule`: nothing is saved here."""
        return None

    def read(self, state: Any) -> Any:
        """See `OuterRule`."""
        return state

    def take(self, state: Any) -> None:
        """See `OuterRule`."""
