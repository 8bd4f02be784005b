"""Cuts the vectors of a step into buckets: the unit in which an exchange is selected and applied.

A bucket covers consecutive elements of one flat store and may hold parts of several pieces. Its
size bounds the scratch memory of an exchange, whatever the model's size and the number of islands.
A piece is cut at whole chunks only, so the rows of a selection do not depend on the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_gradprune.bucket.layout import CHUNK_NUMEL, BucketLayout, lay_out

BUCKET_NUMEL = 2**20
"""Most elements of a bucket in a host's memory: 4 MB of fp32. A multiple of `CHUNK_NUMEL`."""

DEVICE_BUCKET_NUMEL = 2**25
"""The same on an accelerator. There a bucket costs milliseconds of launches and waits, whatever its
size, and a bucket of `BUCKET_NUMEL` is work for microseconds. At 5 % the scratch memory of an
exchange of two then takes 30 MB."""


def bucket_numel_on(device: torch.device) -> int:
    """Most elements of a bucket that is selected from on a device."""
    return BUCKET_NUMEL if device.type == "cpu" else DEVICE_BUCKET_NUMEL


@dataclass(frozen=True, slots=True)
class Part:
    """Elements start .. stop - 1 of one piece.

    Attributes:
        piece: index of the piece.
        start: first element, counted from the piece's start.
        stop: one past the last.
    """

    piece: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Consecutive elements of a flat store.

    Attributes:
        start: first element, counted from the start of the store.
        parts: what lies in it, in order; one segment of `layout` each.
        layout: what lies where.
    """

    start: int
    parts: tuple[Part, ...]
    layout: BucketLayout

    @property
    def stop(self) -> int:
        """One past the last element in the store."""
        return self.start + self.layout.numel


def cut(
    numels: Sequence[int],
    pruned: Sequence[bool],
    offsets: Sequence[int],
    most: int = BUCKET_NUMEL,
) -> tuple[Bucket, ...]:
    """Cut pieces into buckets.

    Args:
        numels: elements of every piece.
        pruned: whether its elements are selected; False: always sent whole.
        offsets: where every piece begins in the store, rising; a gap ends a bucket.
        most: most elements of a bucket, a multiple of `CHUNK_NUMEL`.

    Returns:
        The buckets, in the store's order. Pieces without elements are in none.
    """
    buckets: list[Bucket] = []
    parts: list[Part] = []
    start = end = 0

    def close() -> None:
        if parts:
            layout = lay_out([p.stop - p.start for p in parts], [pruned[p.piece] for p in parts])
            buckets.append(Bucket(start, tuple(parts), layout))
            parts.clear()

    for piece, (numel, offset) in enumerate(zip(numels, offsets, strict=True)):
        done = 0
        while done < numel:
            if parts and (offset + done != end or end - start >= most):
                close()
            if not parts:
                start = end = offset + done
            room = most - (end - start)
            take = numel - done
            if take > room:
                take = room // CHUNK_NUMEL * CHUNK_NUMEL
            if not take:  # less than a chunk is left in the bucket
                close()
                continue
            parts.append(Part(piece, done, done + take))
            done += take
            end += take
    close()
    return tuple(buckets)
