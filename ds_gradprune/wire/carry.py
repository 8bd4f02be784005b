"""One island's bytes for a newcomer, over a crew: whoever is lost meanwhile, all end alike.

The pieces are calls that all islands make, so the epochs of `members` hold for them as for any
call. Who has nothing to bring adds zeros to whole numbers, which changes no bit.

    source lost      all begin again, with the next island as the source
    newcomer lost    all stop; the others go on without it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ds_gradprune.errors import TransportError
from ds_gradprune.wire.crew import CrewTransport

PIECE_BYTES = 2**20
"""So much travels in one call: what a slow link takes in a moment, and more than its latency."""


class Bytes(Protocol):
    """What travels.

    Attributes:
        text: the first bytes.
        nbytes: all together.
    """

    text: bytes
    nbytes: int

    def fill(self, out: torch.Tensor, start: int) -> None:
        """Write the bytes from `start` on into (n,) uint8 on the CPU; beyond the end, nothing."""


def hand_over(crew: CrewTransport, newcomer: int, make: Callable[[], Bytes]) -> bool:
    """Send a newcomer what it lacks; whether it is there still. Collective: all other islands.

    Args:
        crew: with the newcomer in it.
        newcomer: its number.
        make: what travels; asked on the island that sends it.

    Raises:
        TransportError: see `CrewTransport`.
    """
    return _carry(crew, newcomer, make) is not None


def receive(crew: CrewTransport) -> tuple[bytes, torch.Tensor]:
    """What the others hand over to this island. Collective: all other islands.

    Returns:
        The text, and the bytes behind it, (n,) uint8.

    Raises:
        TransportError: nobody is left who could.
    """
    found = _carry(crew, crew.rank, None)
    assert found is not None
    lengths, data = found
    return data[: lengths[0]].numpy().tobytes(), data[lengths[0] : lengths[1]]


def _carry(
    crew: CrewTransport, newcomer: int, make: Callable[[], Bytes] | None
) -> tuple[list[int], torch.Tensor] | None:
    """Lengths of text and all, and the bytes, on the newcomer; None: it is gone."""
    for source in [island for island in crew.took_part if island != newcomer]:
        given = make() if make is not None and source == crew.rank else None
        lengths = torch.tensor([0, 0] if given is None else [len(given.text), given.nbytes])
        crew.all_reduce(lengths)
        text_bytes, nbytes = lengths.tolist()
        data = torch.empty(nbytes if make is None else 0, dtype=torch.uint8)
        start = 0
        while start < nbytes and {source, newcomer} <= {*crew.took_part}:
            length = min(PIECE_BYTES, nbytes - start)
            piece = torch.zeros(-(-length // 4) * 4, dtype=torch.uint8)
            if given is not None:
                given.fill(piece[:length], start)
            crew.all_reduce(piece.view(torch.int32))
            _took(data[start : start + length], piece)
            start += length
        if newcomer not in crew.took_part:
            return None
        if source in crew.took_part:
            return [text_bytes, nbytes], data
    raise TransportError("no island is left that could hand over the state of the run")


def _took(place: torch.Tensor, piece: torch.Tensor) -> None:
    """A piece has come; `place` is empty where nothing is kept. Local."""
    place.copy_(piece[: len(place)])
