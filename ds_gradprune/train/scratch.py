"""Scratch memory of a rank's exchanges: one block, whatever the ranks, and messages."""

from __future__ import annotations

import torch

from ds_gradprune.bucket.block import Scratch, SparseBlock
from ds_gradprune.bucket.layout import BucketLayout


class Memory:
    """Scratch memory of a rank, kept from exchange to exchange."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[torch.device, int], Scratch] = {}
        self._messages: dict[int, torch.Tensor] = {}

    def block(
        self, layout: BucketLayout, k: int, device: torch.device, number: int = 0
    ) -> SparseBlock:
        """Memory for one block; the next call with the same number overwrites it."""
        scratch = self._blocks.setdefault((device, number), Scratch(device))
        return scratch.block(layout, k)

    def message(self, size: int, number: int = 0) -> torch.Tensor:
        """(size,) uint8, CPU; the next call with the same number overwrites it."""
        message = self._messages.get(number)
        if message is None or message.numel() < size:
            message = self._messages[number] = torch.empty(size, dtype=torch.uint8)
        return message[:size]

    def abandon(self) -> None:
        """An exchange failed: whoever still reads a message may keep its memory."""
        self._messages = {}
