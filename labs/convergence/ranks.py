"""The product's ranks in one process: channels over a loopback, and weights without DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.piece import Piece, Rest
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.channel import Channel
from ds_gradprune.wire.loopback import LoopbackHub
from ds_gradprune.wire.owner_reduce import OwnerReduce

T = TypeVar("T")
R = TypeVar("R")

SILENT = RankSignals(
    loss=None,
    nonfinite=False,
    compute_time_s=None,
    codec_time_s=0.0,
    comm_time_s=0.0,
    wire_bytes=0,
    agreement=0,
)
"""Nothing is measured here."""


def is_pruned(shape: torch.Size) -> bool:
    """Whether a tensor's elements are selected, by the product's default `min_numel`."""
    return len(shape) > 1 and shape.numel() >= CHUNK_NUMEL


class Ranks:
    """All ends of a channel.

    Args:
        count: number of ranks.
        exchange: "all_gather" or "owner_reduce".

    Attributes:
        channels: one per rank, in order.
    """

    def __init__(self, count: int, exchange: str) -> None:
        hub = LoopbackHub(count)
        kind: Callable[[Any], Channel] = AllGather if exchange == "all_gather" else OwnerReduce
        self.channels = [kind(hub.transport(rank)) for rank in range(count)]
        self._hub = hub
        self._threads = ThreadPoolExecutor(count)

    def at_once(self, call: Callable[[T], R], ranks: Sequence[T]) -> list[R]:
        """Call one function for every rank, where a rank waits for another inside it.

        The first failure in rank order is raised; the other ranks are woken.
        """

        def woken(rank: T) -> R:
            try:
                return call(rank)
            except Exception:
                self._hub.abort()
                raise

        return list(self._threads.map(woken, ranks))

    def take_received_bits(self) -> float:
        """By one rank since the last call: equal on all, and as many as it has sent."""
        taken = {8.0 * channel.take_wire_bytes() for channel in self.channels}
        assert len(taken) == 1, f"ranks sent different amounts: {taken} bits"
        return taken.pop()

    def close(self) -> None:
        """End threads and channels."""
        self._threads.shutdown()
        for channel in self.channels:
            channel.close()


class RowShards:
    """One island's weights, a row of a matrix, behind the product's `Shards` protocol.

    Args:
        views: (1, *shape) views of the row, one per tensor.
    """

    has_masters = True
    averages_by_groups = True
    warmup_fault: str | None = None

    def __init__(self, views: Sequence[torch.Tensor]) -> None:
        self._pieces = [
            Piece(number, f"tensor {number}", view.view(-1), is_pruned(view.shape[1:]))
            for number, view in enumerate(views)
        ]

    def pieces(self) -> list[Piece]:
        """See `Shards.pieces`."""
        return self._pieces

    def every_piece(self) -> list[Piece]:
        """See `Shards.every_piece`."""
        return self._pieces

    def rest(self) -> Rest:
        """See `Shards.rest`: nothing."""
        return Rest([], [])

    def publish(self) -> None:
        """See `Shards.publish`: the model reads the row itself."""

    def gradients(self) -> list[torch.Tensor]:
        """See `Shards.gradients`: the laboratory averages them itself."""
        return []

    def gradients_changed(self) -> None:
        """See `Shards.gradients_changed`."""

    def state_dict(self) -> dict[str, Any]:
        """See `Shards.state_dict`: nothing is saved here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Shards.load_state_dict`."""

    def close(self) -> None:
        """See `Shards.close`."""
