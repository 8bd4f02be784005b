"""Notices that somebody else has written the weights.

Where a model's parameters are the very tensors that the optimizer steps (fp32, ZeRO stage 0), a
`load_state_dict`, a clamp or an assignment changes what an island takes for its own progress. A
sum over the bits of every tensor, taken when our own work on it is done and compared before the
next begins, sees every such write, however it was made. It reads the weights twice per step.

All functions are local.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_gradprune.native.checksum import checksum
from ds_gradprune.train.piece import Piece


class Watch:
    """Remembers the bits of pieces."""

    def __init__(self) -> None:
        self._sums: dict[object, int] = {}

    def note(self, pieces: Sequence[Piece]) -> None:
        """This is how we leave these pieces."""
        self._sums = {piece.key: checksum(piece.own) for piece in pieces}

    def written(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces that are not as `note` found them; those it has not seen are left out."""
        sums = self._sums
        return [p for p in pieces if p.key in sums and sums[p.key] != checksum(p.own)]

    def forget(self) -> None:
        """Whatever is written from here to the next `note` is not asked for."""
        self._sums = {}
