"""Weights of an island without DeepSpeed: plain tensors behind the `Shards` protocol."""

from __future__ import annotations

from typing import Any

import torch

from ds_gradprune.train.piece import Piece


class PlainShards:
    """Tensors that a test steps itself.

    Args:
        tensors: name -> fp32 tensor.

    Attributes:
        frozen: names that take no part at present.
    """

    has_masters = True

    def __init__(self, tensors: dict[str, torch.Tensor], min_numel: int = 64) -> None:
        self.tensors = tensors
        self.frozen: set[str] = set()
        self._min_numel = min_numel

    def every_piece(self) -> list[Piece]:
        return [
            Piece(name, name, t.view(-1), t.dim() > 1 and t.numel() >= self._min_numel)
            for name, t in self.tensors.items()
        ]

    def pieces(self) -> list[Piece]:
        return [piece for piece in self.every_piece() if piece.name not in self.frozen]

    def publish(self) -> None:
        pass

    def gradients(self) -> list[torch.Tensor]:
        return []

    def gradients_changed(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def random_shards(seed: int = 0, numels: tuple[int, ...] = (6000, 5000)) -> PlainShards:
    """Matrices of these sizes with a vector after each: a bucket of 8192 cuts them in pieces."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, numel in enumerate(numels):
        tensors[f"matrix{number}"] = torch.randn(numel // 4, 4, generator=generator)
        tensors[f"vector{number}"] = torch.randn(10, generator=generator)
    return PlainShards(tensors)
