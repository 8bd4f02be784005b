"""The ranks of an island agree before the islands do: one set of signals for all of them.

Times are the slowest rank's, bytes are what the island's link carries, so their sum, and the loss
is the mean. What one rank does not know, the island does not know.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.law.signals import RankSignals

_FIELDS = ("loss", "compute_time_s", "codec_time_s", "comm_time_s", "wire_bytes")


class InsideIsland:
    """Agreement between the ranks of one island.

    Args:
        group: their process group; None: the island has one rank, and agrees with itself.
        device: where the group's backend wants its tensors.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._size = 1 if group is None else dist.get_world_size(group)

    def agree(self, mine: RankSignals, dense_bytes: int) -> tuple[RankSignals, int]:
        """What the island says, and what it would send without pruning.

        Args:
            mine: this rank's signals.
            dense_bytes: what this rank would send without pruning.

        Collective: all ranks of the island.
        """
        if self._size == 1:
            return mine, dense_bytes
        known = [getattr(mine, field) for field in _FIELDS]
        row = [math.nan if value is None else float(value) for value in known]
        row += [float(mine.nonfinite), float(mine.written), float(dense_bytes)]
        rows = self._gather(row)
        losses, computes, codecs, comms, wires, nonfinite, written, dense = (
            list(column) for column in zip(*rows, strict=True)
        )
        island = dataclasses.replace(
            mine,
            loss=_or_none(sum(losses) / len(losses)),
            compute_time_s=_or_none(_most(computes)),
            codec_time_s=_most(codecs),
            comm_time_s=_most(comms),
            wire_bytes=int(sum(wires)),
            nonfinite=any(nonfinite),
            written=any(written),
        )
        return island, int(sum(dense))

    def union(self, numbers: list[int], most: int) -> list[int]:
        """Every number that some rank of the island has in its list.

        Args:
            numbers: in 0 .. most - 1.
            most: how many numbers there are.

        Collective: all ranks of the island.
        """
        if self._size == 1:
            return numbers
        row = [float(number in numbers) for number in range(most)]
        return [i for i, column in enumerate(zip(*self._gather(row), strict=True)) if any(column)]

    def _gather(self, row: list[float]) -> list[list[float]]:
        mine = torch.tensor(row, dtype=torch.float64, device=self._device)
        rows = [torch.empty_like(mine) for _ in range(self._size)]
        dist.all_gather(rows, mine, group=self._group)
        return [other.tolist() for other in rows]


def _most(values: list[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
