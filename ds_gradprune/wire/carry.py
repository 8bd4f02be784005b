"""One island's bytes for a newcomer, over a crew: whoever is lost meanwhile, all end alike.

The pieces are calls that all islands make, so the epochs of `members` hold for them as for any
call. Who has nothing to bring adds zeros to whole numbers, which changes no bit.

    source lost      all begin again, with the next island as the source
    newcomer lost    all stop; the others go on without it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import google_crc32c
import torch

from ds_gradprune.errors import TransportError, WireFormatError
from ds_gradprune.wire.crew import CrewTransport

PIECE_BYTES = 2**20
"""So much travels in one call: what a slow link takes in a moment, and more than its latency."""


class Bytes(Protocol):
    """What travels.

    Attributes:
        text: the first bytes.
        nbytes: all together.
        crc: crc32c of all.
    """

    text: bytes
    nbytes: int
    crc: int

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


def receive(crew: CrewTransport, most_bytes: int) -> tuple[bytes, torch.Tensor]:
    """What the others hand over to this island. Collective: all other islands.

    Args:
        crew: with this island in it.
        most_bytes: no run of this engine has more to hand over.

    Returns:
        The text, and the bytes behind it, (n,) uint8.

    Raises:
        TransportError: nobody is left who could.
        WireFormatError: more is told to come, or something else has come than was sent.
    """
    found = _carry(crew, crew.rank, None, most_bytes)
    assert found is not None
    (text_bytes, _, crc), data = found
    if google_crc32c.value(data.numpy()) != crc:
        raise WireFormatError(
            f"what another island has handed over to island {crew.rank} is damaged: its checksum "
            "differs. Start it again; test the network and the memory of the hosts."
        )
    return data[:text_bytes].numpy().tobytes(), data[text_bytes:]


def _carry(
    crew: CrewTransport,
    newcomer: int,
    make: Callable[[], Bytes] | None,
    most_bytes: int | None = None,
) -> tuple[list[int], torch.Tensor] | None:
    """Length of the text, of all, checksum, and the bytes, on the newcomer; None: it is gone."""
    for source in [island for island in crew.took_part if island != newcomer]:
        given = make() if make is not None and source == crew.rank else None
        facts = [0, 0, 0] if given is None else [len(given.text), given.nbytes, given.crc]
        head = torch.tensor(facts, dtype=torch.int64)
        crew.all_reduce(head)
        facts = head.tolist()
        text_bytes, nbytes, _ = facts
        if not 0 <= text_bytes <= nbytes or (most_bytes is not None and nbytes > most_bytes):
            raise WireFormatError(
                f"the state that is handed over to island {newcomer} must have at most "
                f"{most_bytes} bytes, got {nbytes} with {text_bytes} of text: noise on the wire."
            )
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
            return facts, data
    raise TransportError("no island is left that could hand over the state of the run")


def _took(place: torch.Tensor, piece: torch.Tensor) -> None:
    """A piece has come; `place` is empty where nothing is kept. Local."""
    place.copy_(piece[: len(place)])
