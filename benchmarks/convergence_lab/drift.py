"""A slow average of the shared weights' moves, a share of which is added to each of them."""

from __future__ import annotations

import torch

_MEMORY = 0.99
"""Decay of the sums that the prediction rests on, per exchange."""


class Drift:
    """An average of moves, and how much of the next move it foretells.

    With D the average before a move u, r = sum(<u, D>) / sum(<D, D>) is the factor of D that
    predicts u best (least squares): 1 if what has moved goes on moving, 0 if the moves are noise
    about nothing, negative if they swing back.

    Args:
        numel: of a move.
        strength: share of the average that is added.
        decay: of the average per exchange.
        predicted: multiply the share by r, cut to [0, 1].
    """

    def __init__(self, numel: int, strength: float, decay: float, *, predicted: bool) -> None:
        self._average = torch.zeros(1, numel)
        self._strength = strength
        self._decay = decay
        self._predicted = predicted
        self._product = self._square = 0.0

    @property
    def persistence(self) -> float:
        """r; 0 as long as there is no average."""
        return self._product / self._square if self._square > 0.0 else 0.0

    def add_to(self, move: torch.Tensor, whole: torch.Tensor | None = None) -> torch.Tensor:
        """The move with its share of the average, which has taken note of it.

        Args:
            move: (1, numel).
            whole: (1, numel), what the average is to foretell; None: the move.
        """
        average = self._average
        foretold = move if whole is None else whole
        self._product = _MEMORY * self._product + float(torch.dot(foretold[0], average[0]))
        self._square = _MEMORY * self._square + float(average.square().sum())
        average.lerp_(move, 1 - self._decay)
        share = self._strength
        if self._predicted:
            share *= min(1.0, max(0.0, self.persistence))
        return move + share * average
