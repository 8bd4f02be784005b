"""The weights all islands agree on, and what an island has beyond them.

An island trains its own weights. `shared` is one fp32 copy, bit-identical on all islands; the
difference own - shared is the island's progress that it has not sent yet. There is no residual
buffer: what is not sent stays in the own weights, where the island goes on using it.

Knows nothing of selection, codecs, transports and DeepSpeed. All functions are local; what must be
equal on all ranks is said.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import google_crc32c
import torch

from ds_gradprune.records import Part

BUCKET_NUMEL = 2**26
"""A bucket is closed once it holds so many elements: an exchange needs one bucket's memory."""


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Consecutive weight tensors: numbers first .. last - 1, and their shared copy."""

    first: int
    last: int
    shapes: tuple[torch.Size, ...]
    shared: torch.Tensor


class SharedWeights:
    """One copy of the weights, and how it moves.

    Args:
        own: gives the island's weights: contiguous fp32 tensors, always the same ones in the same
            order; asked anew at every call, because a framework may replace a tensor's memory.
        bucket_numel: see `BUCKET_NUMEL`.
    """

    def __init__(
        self, own: Callable[[], Sequence[torch.Tensor]], bucket_numel: int = BUCKET_NUMEL
    ) -> None:
        self._own = own
        self._buckets: list[_Bucket] = []
        tensors = own()
        first = numel = 0
        for index, tensor in enumerate(tensors):
            numel += tensor.numel()
            if numel >= bucket_numel or index == len(tensors) - 1:
                group = tensors[first : index + 1]
                shared = torch.cat([t.detach().reshape(-1) for t in group])
                shapes = tuple(t.shape for t in group)
                self._buckets.append(_Bucket(first, index + 1, shapes, shared))
                first, numel = index + 1, 0

    @property
    def shapes(self) -> list[tuple[torch.Size, ...]]:
        """Of every bucket: the shapes of its tensors."""
        return [bucket.shapes for bucket in self._buckets]

    @property
    def nbytes(self) -> int:
        """Bytes of the shared copy."""
        return sum(bucket.shared.numel() * 4 for bucket in self._buckets)

    def shared(self, bucket: int) -> torch.Tensor:
        """(numel,) fp32, the shared weights of one bucket; not to be changed."""
        return self._buckets[bucket].shared

    @torch.no_grad()
    def own(self, bucket: int) -> torch.Tensor:
        """(numel,) fp32, a copy of the island's own weights of one bucket."""
        return torch.cat([tensor.view(-1) for tensor in self._tensors(self._buckets[bucket])])

    @torch.no_grad()
    def capture(self) -> None:
        """The own weights, equal on all islands, become the shared ones."""
        for number, bucket in enumerate(self._buckets):
            bucket.shared.copy_(self.own(number))

    def is_finite(self) -> bool:
        """The own weights hold no inf and no nan."""
        norms = torch._foreach_norm([t.detach() for t in self._own()], ord=float("inf"))
        return bool(torch.isfinite(torch.stack(norms)).all())

    @torch.no_grad()
    def move(
        self,
        bucket: int,
        own: torch.Tensor,
        parts: Sequence[Part],
        rank: int,
        factor: float,
        drift: torch.Tensor | None = None,
    ) -> None:
        """Apply what all islands sent of their own - shared.

        shared += factor * sent, island after island; own = shared + (own - shared - own sent),
        with the shared weights after and before. Elements that nobody sent keep their bits. The
        others are rounded as any fp32 weight update is: `shared` once per island that sent the
        element, `own` once. A drift is added to both, and rounds both once more everywhere.

        Args:
            bucket: which one.
            own: (numel,) fp32, what `own` returned; used up.
            parts: what each island sent, in rank order; equal on all islands.
            rank: the number of this island in `parts`.
            factor: weight of one island's progress; equal on all islands.
            drift: (numel,) fp32, what all weights move by besides; equal on all islands.
        """
        shared = self._buckets[bucket].shared
        mine, sent = parts[rank]
        others = [
            positions.to(mine) for number, (positions, _) in enumerate(parts) if number != rank
        ]
        moved = torch.cat([mine[:0], *others])
        # index_select and scatter_ are twice as fast on CPUs as indexing with brackets.
        unsent = own.index_select(0, mine).sub_(shared.index_select(0, mine)).sub_(sent)
        beyond = own.index_select(0, moved).sub_(shared.index_select(0, moved))
        for positions, values in parts:
            # Not alpha=factor: whether that is one rounding or two depends on the processor.
            shared.index_add_(0, positions.to(mine), values.to(shared).mul(factor))
        # An element may come twice in `moved`, with the same value; if it is mine too, mine holds.
        own.scatter_(0, moved, beyond.add_(shared.index_select(0, moved)))
        own.scatter_(0, mine, unsent.add_(shared.index_select(0, mine)))
        if drift is not None:
            shared.add_(drift)
            own.add_(drift)
        self._write(self._buckets[bucket], own)

    @torch.no_grad()
    def move_all(self, bucket: int, move: torch.Tensor, drift: torch.Tensor | None = None) -> None:
        """Apply the whole progress of all islands: shared += move; own = shared.

        Args:
            bucket: which one.
            move: (numel,) fp32, factor times the sum of all islands' own - shared.
            drift: as in `move`.
        """
        shared = self._buckets[bucket].shared
        shared.add_(move)
        if drift is not None:
            shared.add_(drift)
        self._write(self._buckets[bucket], shared)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange own and shared weights, bit for bit; a second call undoes it.

        Between the two calls the model holds the shared weights, and this object the own ones.
        """
        for number, bucket in enumerate(self._buckets):
            own = self.own(number)
            self._write(bucket, bucket.shared)
            bucket.shared.copy_(own)

    @torch.no_grad()
    def set_own(self, saved: Sequence[torch.Tensor]) -> None:
        """Put back what `own` returned for every bucket.

        Raises:
            ValueError: the tensors are not those of these buckets.
        """
        for bucket, own in zip(self._buckets, saved, strict=True):
            if own.shape != bucket.shared.shape:
                raise ValueError(f"{tuple(own.shape)} is not {tuple(bucket.shared.shape)}")
            self._write(bucket, own)

    def crc(self) -> int:
        """crc32c over the bits of the shared weights."""
        crc = 0
        for bucket in self._buckets:
            crc = google_crc32c.extend(crc, bucket.shared.cpu().view(torch.uint8).numpy())
        return int(crc)

    def _tensors(self, bucket: _Bucket) -> Iterator[torch.Tensor]:
        tensors = self._own()
        return (t.detach() for t in itertools.islice(tensors, bucket.first, bucket.last))

    def _write(self, bucket: _Bucket, flat: torch.Tensor) -> None:
        """Copy a flat vector into the island's weights."""
        start = 0
        for tensor in self._tensors(bucket):
            stop = start + tensor.numel()
            tensor.view(-1).copy_(flat[start:stop])
            start = stop
