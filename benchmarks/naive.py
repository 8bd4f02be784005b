"""The simplest pruned exchange that works: what ours has to beat in the same run.

The first trial of the project, written anew: torch.topk per chunk, bf16 values, 16-bit indices,
error feedback, everything a new tensor. It takes the place of DeepSpeed's `allreduce_bucket`.
"""

from __future__ import annotations

from typing import Any

import torch

from ds_gradprune.records import CHUNK_NUMEL
from ds_gradprune.transport.base import Transport


class NaiveTopk:
    """Averages flat vectors over a transport, keeping k per chunk of CHUNK_NUMEL.

    Args:
        transport: moves the bytes.
        k: kept elements per chunk.
    """

    def __init__(self, transport: Transport, k: int) -> None:
        self._transport, self._k = transport, k
        self._residual: torch.Tensor | None = None

    def average(self, vector: torch.Tensor) -> torch.Tensor:
        """The mean over ranks of what each keeps of (numel,) fp32. Collective."""
        if self._residual is None:
            self._residual = torch.zeros_like(vector)
        owed = self._residual + vector
        rows = torch.nn.functional.pad(owed, (0, -owed.numel() % CHUNK_NUMEL)).view(-1, CHUNK_NUMEL)
        indices = rows.abs().topk(self._k, dim=1).indices
        values = rows.gather(1, indices).bfloat16()
        self._residual = (rows - _spread(rows, indices, values)).view(-1)[: vector.numel()]
        parts = (indices.to(torch.int16).view(-1), values.view(-1).view(torch.int16))
        payload = torch.cat(parts).view(torch.uint8)
        gathered = torch.empty((self._transport.world_size, payload.numel()), dtype=torch.uint8)
        self._transport.all_gather(payload, gathered)
        total = torch.zeros_like(rows)
        for row in gathered:
            places, bits = row.view(torch.int16).chunk(2)
            sent = bits.view(torch.bfloat16).view_as(values)
            total += _spread(rows, places.view_as(indices).long(), sent)
        return total.view(-1)[: vector.numel()] / self._transport.world_size


def _spread(like: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like).scatter_(1, indices, values.to(like.dtype))


def install(engine: Any, transport: Transport, k: int) -> None:
    """Let a DeepSpeed engine at ZeRO stage 0 reduce this way. Local."""
    reducer = NaiveTopk(transport, k)

    def allreduce_bucket(
        bucket: list[torch.Tensor], dp_group: Any, dp_world_size: int | None = None
    ) -> torch.Tensor:
        return reducer.average(engine.flatten(bucket))

    engine.allreduce_bucket = allreduce_bucket
