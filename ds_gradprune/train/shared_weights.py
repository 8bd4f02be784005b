"""The weights all islands agree on, and what an island has beyond them.

An island trains its own weights. Of every piece (`train.piece`) there is one fp32 copy, the shared
weights, bit-identical on all islands: 4 bytes per parameter. The difference own - shared is the
island's residual: progress that it has not sent yet. It stays in the own weights, where the island
goes on using it.

A piece is known by its key. A piece that is frozen keeps its shared weights and its residual, and
takes part again when it is thawed. One that is seen for the first time joins with residual zero.

Knows nothing of selection, codecs, transports and DeepSpeed. All functions are local; what must be
equal on all ranks is said.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import google_crc32c
import torch

from ds_gradprune.bucket.layout import BucketLayout
from ds_gradprune.train.buckets import Bucket, bucket_numel_on, cut
from ds_gradprune.train.crc import crc_of
from ds_gradprune.train.piece import Piece, Shards


@dataclass(frozen=True, slots=True)
class Bound:
    """A bucket with the memory it lies in, for one exchange.

    Attributes:
        store: number of the store of shared weights.
        start: the bucket's first element in that store.
        layout: what lies where.
        own: the island's weights, 1-D fp32 views, one per segment.
        shared: (numel,) fp32, a view of the store.
    """

    store: int
    start: int
    layout: BucketLayout
    own: tuple[torch.Tensor, ...]
    shared: torch.Tensor

    @property
    def stop(self) -> int:
        """One past the last element in the store."""
        return self.start + self.layout.numel

    def beside(self) -> torch.Tensor:
        """The shared weights on the device of the own ones: themselves, or a copy."""
        return self.shared.to(self.own[0].device)

    def give_back(self, shared: torch.Tensor) -> None:
        """What `beside` gave has changed: so do the shared weights."""
        if shared is not self.shared:
            self.shared.copy_(shared)

    def split(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A (numel,) vector as one view per segment."""
        return torch.split(flat, [own.numel() for own in self.own])

    def shift(self, shared: torch.Tensor, drift: torch.Tensor) -> None:
        """Add a (numel,) drift to own weights and to `shared`."""
        drift = drift.to(shared.device)
        shared.add_(drift)
        for own, part in zip(self.own, self.split(drift), strict=True):
            own.add_(part)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the shared weights of a piece lie."""

    store: int
    start: int
    numel: int


class SharedWeights:
    """One copy of the weights.

    Args:
        shards: gives the island's weights on this rank.
        bucket_numel: most elements of a bucket; None: what suits the weights' device.
        on_cpu: the copy lies in the host's memory, whatever the weights' device.

    Attributes:
        stores: flat fp32 tensors; a further one for pieces that are seen later.
        are_swapped: the model holds the shared weights, and the stores the own ones.
    """

    def __init__(
        self, shards: Shards, bucket_numel: int | None = None, *, on_cpu: bool = False
    ) -> None:
        self.stores: list[torch.Tensor] = []
        self.are_swapped = False
        self._shards = shards
        devices = [piece.own.device for piece in shards.pieces()] or [torch.device("cpu")]
        self._bucket_numel = bucket_numel or bucket_numel_on(devices[0])
        self._on_cpu = on_cpu
        self._places: dict[Hashable, _Place] = {}
        self._bound: tuple[list[Piece], list[Bound]] = ([], [])
        self._cuts: dict[tuple[Hashable, ...], tuple[tuple[int, Bucket], ...]] = {}
        self.join()

    @property
    def nbytes(self) -> int:
        """Bytes of the shared copy."""
        return sum(4 * store.numel() for store in self.stores)

    @property
    def numel(self) -> int:
        """Elements of the pieces that are trained now."""
        return sum(piece.own.numel() for piece in self._shards.pieces())

    @torch.no_grad()
    def join(self) -> None:
        """Pieces that are trained for the first time join: their own weights are the shared ones.

        Their own weights must be equal on all islands.
        """
        self._add([p for p in self._shards.pieces() if p.key not in self._places])

    def _add(self, new: Sequence[Piece]) -> None:
        start = 0
        for piece in new:
            self._places[piece.key] = _Place(len(self.stores), start, piece.own.numel())
            start += piece.own.numel()
        if new:
            device = torch.device("cpu") if self._on_cpu else new[0].own.device
            store = torch.empty(start, dtype=torch.float32, device=device)
            self.stores.append(store.pin_memory() if self._pins(device) else store)
            for piece in new:
                self.shared(piece).copy_(piece.own)

    def shared(self, piece: Piece) -> torch.Tensor:
        """(numel,) fp32, a view of what the stores hold of a piece.

        Raises:
            ValueError: the piece has another size than when it joined.
        """
        place = self._places[piece.key]
        if place.numel != piece.own.numel():
            raise ValueError(
                f"{piece.name} had {place.numel} elements here, and now has {piece.own.numel()}"
            )
        return self.stores[place.store][place.start : place.start + place.numel]

    def bound(self) -> list[Bound]:
        """The buckets of the pieces that are trained now, with their memory; own weights in place.

        The same on the same-index ranks of all islands.
        """
        trained = self._shards.pieces()
        if trained is self._bound[0]:
            return self._bound[1]
        self.join()
        pieces = [p for p in trained if p.own.numel()]
        keys = tuple(piece.key for piece in pieces)
        cuts = self._cuts.get(keys)
        if cuts is None:
            cuts = self._cuts[keys] = tuple(self._cut(pieces))
        bounds = []
        for number, bucket in cuts:
            own = tuple(pieces[p.piece].own[p.start : p.stop] for p in bucket.parts)
            shared = self.stores[number][bucket.start : bucket.stop]
            bounds.append(Bound(number, bucket.start, bucket.layout, own, shared))
        self._bound = trained, bounds
        return bounds

    def pieces_crc(self) -> int:
        """crc32c over which pieces are trained now; equal on all islands."""
        keys = repr([(p.key, p.own.numel(), p.pruned) for p in self._shards.pieces()])
        return int(google_crc32c.value(keys.encode()))

    def known(self) -> list[Piece]:
        """The pieces that were ever trained; the others are equal on all islands."""
        return [p for p in self._shards.every_piece() if p.key in self._places]

    @torch.no_grad()
    def capture(self) -> None:
        """The own weights, equal on all islands, become the shared ones."""
        assert not self.are_swapped
        self.join()
        for piece in self.known():
            self.shared(piece).copy_(piece.own)

    @torch.no_grad()
    def reset_own(self) -> None:
        """The shared weights become the own ones: all residuals end."""
        if self.are_swapped:
            self.swap()
        for piece in self.known():
            piece.own.copy_(self.shared(piece))

    def is_finite(self) -> bool:
        """The own weights that are trained hold no inf and no nan."""
        own = [piece.own for piece in self._shards.pieces() if piece.own.numel()]
        if not own:
            return True
        norms = torch._foreach_norm(own, ord=float("inf"))
        return bool(torch.isfinite(torch.stack([norm.cpu() for norm in norms])).all())

    @torch.no_grad()
    def residual_norm(self) -> float:
        """2-norm of own - shared over the pieces that were ever trained."""
        squares = 0.0
        for piece in self.known():
            shared = self.shared(piece)
            for start in range(0, piece.own.numel(), self._bucket_numel):
                here = slice(start, start + self._bucket_numel)
                apart = piece.own[here] - shared[here].to(piece.own.device)
                squares += float(apart.norm()) ** 2
        return math.sqrt(squares)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange own and shared weights, bit for bit; a second call undoes it.

        Between the two calls the model holds the shared weights, and the stores the own ones.
        Whoever calls it publishes the weights afterwards.
        """
        self.join()
        for piece in self.known():
            shared = self.shared(piece)
            for start in range(0, piece.own.numel(), self._bucket_numel):
                here = slice(start, start + self._bucket_numel)
                own = piece.own[here].clone()
                piece.own[here].copy_(shared[here])
                shared[here].copy_(own)
        self.are_swapped = not self.are_swapped

    def own_state(self) -> dict[str, torch.Tensor]:
        """The own weights of every piece that was ever trained, by key; views."""
        return {repr(p.key): self.shared(p) if self.are_swapped else p.own for p in self.known()}

    @torch.no_grad()
    def set_own(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Put back what `own_state` gave; the shared weights are in place."""
        pieces = [p for p in self._shards.every_piece() if repr(p.key) in saved]
        self._add([p for p in pieces if p.key not in self._places])
        for piece in pieces:
            piece.own.copy_(saved[repr(piece.key)])

    def fits(self, saved: Mapping[str, torch.Tensor]) -> bool:
        """Whether `saved` is of these pieces."""
        shapes = {repr(p.key): p.own.shape for p in self._shards.every_piece()}
        return all(shapes.get(key) == tensor.shape for key, tensor in saved.items())

    def crc(self) -> int:
        """crc32c over the bits of the shared weights, wherever they are now."""
        return crc_of(self._shared_tensors())

    def own_crc(self) -> int:
        """The same over the own weights; equal on all islands until they part."""
        return crc_of(piece.own for piece in self.known() if piece.own.numel())

    def _shared_tensors(self) -> Iterator[torch.Tensor]:
        for piece in self.known():
            if piece.own.numel():
                yield piece.own if self.are_swapped else self.shared(piece)

    def _cut(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, Bucket]]:
        places = [self._places[piece.key] for piece in pieces]
        for number in sorted({place.store for place in places}):
            here = [i for i, place in enumerate(places) if place.store == number]
            here.sort(key=lambda i: places[i].start)
            buckets = cut(
                [places[i].numel for i in here],
                [pieces[i].pruned for i in here],
                [places[i].start for i in here],
                self._bucket_numel,
            )
            for bucket in buckets:
                parts = tuple(type(p)(here[p.piece], p.start, p.stop) for p in bucket.parts)
                yield number, Bucket(bucket.start, parts, bucket.layout)

    def _pins(self, device: torch.device) -> bool:
        return device.type == "cpu" and torch.cuda.is_available()
