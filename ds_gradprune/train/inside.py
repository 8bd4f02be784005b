"""How the ranks of an island share a gradient bucket: dense inside, each element once outside.

    take       sum the bucket inside the island; every rank keeps its share of the sum
    ...        same-index ranks of all islands exchange their shares, pruned or dense
    give       every rank hands its share of the result to the others of its island

A share is the same part of every parameter, so it does not depend on what else lies in a bucket: a
residual stays with its rank. All islands divide alike. What fails on one rank between the two is
raised on all of the island.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.transport import Transport

PIECE_NUMEL = 2**20
"""Elements of a share that are handed out at a time: bounds the scratch memory."""


@dataclass(frozen=True, slots=True)
class Gradient:
    """One parameter's share of a bucket.

    Attributes:
        key: the parameter's name; stable over the run.
        numel: its elements.
        pruned: its elements are selected; False: always sent whole.
    """

    key: str
    numel: int
    pruned: bool

    def part(self, start: int, stop: int) -> Gradient:
        """Elements start .. stop - 1, with a key of their own."""
        if stop - start == self.numel:
            return self
        return Gradient(f"{self.key}[{start}:{stop}]", stop - start, self.pruned)


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive elements of a bucket that belong to one rank.

    Attributes:
        start: first element in the bucket.
        stop: one past the last.
        gradient: whose they are.
    """

    start: int
    stop: int
    gradient: Gradient


def divide(gradients: Sequence[Gradient], count: int) -> tuple[tuple[Part, ...], ...]:
    """Deal out a bucket: every rank gets the same part of every gradient, to one element. Local.

    Args:
        gradients: what lies in it, in order.
        count: ranks of the island.

    Returns:
        Each rank's parts, in the bucket's order; none of them is empty.
    """
    shares: list[list[Part]] = [[] for _ in range(count)]
    offset = 0
    for gradient in gradients:
        cuts = [gradient.numel * rank // count for rank in range(count + 1)]
        for share, start, stop in zip(shares, cuts, cuts[1:], strict=False):
            if start < stop:
                share.append(Part(offset + start, offset + stop, gradient.part(start, stop)))
        offset += gradient.numel
    return tuple(map(tuple, shares))


class Inside:
    """The ranks of this rank's island.

    Args:
        transport: over them.
        stopwatch: what happens here counts as computation: plain DeepSpeed does it as well.
        together: called on every rank with what has failed there, or with None; raises on all of
            them what has failed on one. Collective: all ranks of the island.
    """

    def __init__(
        self,
        transport: Transport,
        stopwatch: Stopwatch,
        together: Callable[[Exception | None], object],
    ) -> None:
        self.together = together
        self._transport = transport
        self._stopwatch = stopwatch
        self._divided: dict[tuple[Gradient, ...], tuple[tuple[Part, ...], ...]] = {}

    def take(
        self, vector: torch.Tensor, gradients: Sequence[Gradient]
    ) -> tuple[torch.Tensor, tuple[Gradient, ...]]:
        """Sum a bucket over the island.

        Args:
            vector: (numel,) any floating dtype, contiguous; its contents are lost.
            gradients: what lies in it, in order.

        Returns:
            This rank's share of the sum, in memory of its own, and what lies in it.

        Raises:
            TransportError: the sum failed.

        Collective: all ranks of the island.
        """
        with self._stopwatch.phase("compute"):
            self._transport.all_reduce(vector)
            mine = self._parts(gradients)[self._transport.rank]
            views = [vector[part.start : part.stop] for part in mine]
            share = torch.cat(views) if views else vector.new_empty(0)
        return share, tuple(part.gradient for part in mine)

    def give(
        self, share: torch.Tensor, vector: torch.Tensor, gradients: Sequence[Gradient]
    ) -> None:
        """Let `vector` be the shares of all ranks.

        Args:
            share: what `take` returned first, changed meanwhile.
            vector: the bucket; overwritten.
            gradients: what lies in it.

        Raises:
            TransportError: a rank did not answer.

        Collective: all ranks of the island.
        """
        parts = self._parts(gradients)
        longest = max(sum(p.stop - p.start for p in mine) for mine in parts)
        with self._stopwatch.phase("compute"):
            for first in range(0, longest, PIECE_NUMEL):
                numel = min(PIECE_NUMEL, longest - first)
                rows = self._gather(share[first : first + numel], numel)
                for mine, row in zip(parts, rows, strict=True):
                    for here, there in _within(mine, first, numel):
                        vector[there].copy_(row[here])

    def _gather(self, piece: torch.Tensor, numel: int) -> torch.Tensor:
        """(ranks, numel), everybody's piece; the ends of shorter ones hold anything."""
        if piece.numel() < numel:
            piece = torch.nn.functional.pad(piece, (0, numel - piece.numel()))
        rows = piece.new_empty(self._transport.world_size, numel)
        self._transport.all_gather(piece.view(torch.uint8), rows.view(torch.uint8))
        return rows

    def _parts(self, gradients: Sequence[Gradient]) -> tuple[tuple[Part, ...], ...]:
        together = tuple(gradients)
        if together not in self._divided:
            self._divided[together] = divide(together, self._transport.world_size)
        return self._divided[together]


def _within(parts: Sequence[Part], first: int, numel: int) -> Iterator[tuple[slice, slice]]:
    """Where elements first .. first + numel - 1 of a share lie: in these, and in the bucket."""
    start = 0
    for part in parts:
        stop = start + part.stop - part.start
        low, high = max(start, first), min(stop, first + numel)
        if low < high:
            yield (
                slice(low - first, high - first),
                slice(part.start + low - start, part.start + high - start),
            )
        start = stop
