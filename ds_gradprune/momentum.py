"""The slow momentum of the shared weights: what has moved one way for long moves further.

Shared weights average the islands, so they are quieter than one optimizer's, and they follow what
has lasted too slowly. With `move` what the exchanges have just added to them, per element::

    drift = decay * drift + strength * (1 - decay) * move
    weights += drift

A lasting move becomes 1 + strength times as far, noise hardly further. The form is AdEMAMix's
(Pagliardini et al. 2024, arXiv 2409.03137: a slow average beside the fast one), applied outside the
optimizer as in SlowMo (Wang et al. 2020, arXiv 1910.00643). Nothing is sent for it: all islands
compute it from what they have received, so `drift` is bit-identical on all of them. It is off by
default: it closed the gap to dense at 1M parameters, changed little at 0.16M and 10M, and doubled
the gap at 10M at twice the learning rate; a strength taken from how much the average foretells
gained nothing (LOG.md, 2026-11-26).

Knows nothing of exchanges and DeepSpeed. All functions are local.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_gradprune.records import Part


class SlowMomentum:
    """One average per bucket of shared weights: 4 bytes per parameter.

    Args:
        shared: (numel,) fp32 of every bucket; only shapes and devices are taken.
        strength: how much of the average is added per exchange, > 0.
        decay: of the average per exchange, in [0, 1).
    """

    def __init__(self, shared: Sequence[torch.Tensor], strength: float, decay: float) -> None:
        self._drifts = [torch.zeros_like(tensor) for tensor in shared]
        self._decay = decay
        self._share = strength * (1.0 - decay)

    @property
    def nbytes(self) -> int:
        """Bytes of the averages."""
        return sum(4 * drift.numel() for drift in self._drifts)

    @torch.no_grad()
    def follow(self, bucket: int, parts: Sequence[Part], factor: float) -> torch.Tensor:
        """Take note of an exchange, given as `SharedWeights.move` takes it.

        Returns:
            (numel,) fp32, what the weights move by besides; holds until the next call, not to be
            changed.
        """
        drift = self._drifts[bucket].mul_(self._decay)
        for positions, values in parts:
            # Not alpha: whether that is one rounding or two depends on the processor.
            share = values.to(drift).mul(factor * self._share)
            drift.index_add_(0, positions.to(drift.device), share)
        return drift

    @torch.no_grad()
    def follow_all(self, bucket: int, move: torch.Tensor) -> torch.Tensor:
        """The same for a dense exchange.

        Args:
            bucket: which one.
            move: (numel,) fp32, what the shared weights have moved by.

        Returns:
            As `follow`.
        """
        return self._drifts[bucket].mul_(self._decay).add_(move.mul(self._share))

    def reset(self) -> None:
        """Forget the past: the weights have become others. Local."""
        for drift in self._drifts:
            drift.zero_()

    def state_dict(self) -> list[torch.Tensor]:
        """The averages. Local."""
        return self._drifts

    def load_state_dict(self, state: Sequence[torch.Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: the tensors are not those of these buckets.
        """
        for drift, saved in zip(self._drifts, state, strict=True):
            if drift.shape != saved.shape:
                raise ValueError(f"{tuple(saved.shape)} is not {tuple(drift.shape)}")
            drift.copy_(saved)
