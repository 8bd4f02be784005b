"""Scratch memory of a rank's exchanges: one block, one message, whatever the number of ranks."""

from __future__ import annotations

import torch

from ds_gradprune.bucket.block import Scratch, SparseBlock
from ds_gradprune.bucket.layout import BucketLayout


class Memory:
    """Scratch memory of a rank, kept from exchange to exchange."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[torch.device, int], Scratch] = {}
        self._message = torch.empty(0, dtype=torch.uint8)

    def block(
        self, layout: BucketLayout, k: int, device: torch.device, number: int = 0
    ) -> SparseBlock:
        """Memory for one block; the next call with the same number overwrites it."""
        scratch = self._blocks.setdefault((device, number), Scratch(device))
        return scratch.block(layout, k)

    def message(self, size: int) -> torch.Tensor:
        """(size,) uint8, CPU; the next call overwrites it."""
        if self._message.numel() < size:
            self._message = torch.empty(size, dtype=torch.uint8)
        return self._message[:size]

    def abandon(self) -> None:
        """An exchange failed: whoever still reads the message may keep its memory."""
        self._message = torch.empty(0, dtype=torch.uint8)
