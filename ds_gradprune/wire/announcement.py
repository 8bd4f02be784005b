"""The headers of all ranks, before any payload: found to agree, or the first difference is named.

A row of the announcement is a header of 64 bytes and 16 bytes on what is to follow, little endian:
the bytes of all payloads together (u64), their number (u16, 65535 for more), how many ranks have
taken part in the call before (u16), and the crc32c of the sizes (u32).
Its size depends on nothing, so it can be exchanged by ranks that disagree about everything else.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import google_crc32c
import numpy as np
import torch

from ds_gradprune import codec
from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.errors import RankMismatchError, WireFormatError
from ds_gradprune.wire.transport import Transport

_SIZES = struct.Struct("<QHHI")
_MOST = 2**16 - 1
ROW_BYTES = codec.HEADER_BYTES + _SIZES.size
"""What one rank announces."""


@dataclass(frozen=True, slots=True)
class _Row:
    """What one rank says, and from which place.

    Attributes:
        place: the rank that it came from.
        header: its header.
        message_bytes: of the payloads to follow.
        num_payloads: their number.
        islands: how many there were in the call before.
        sizes_crc: crc32c of their sizes.
    """

    place: int
    header: codec.Header
    message_bytes: int
    num_payloads: int
    islands: int
    sizes_crc: int

    def __str__(self) -> str:
        header = self.header
        message = f", {self.message_bytes} bytes to follow" if self.num_payloads else ""
        return (
            f"rank {self.place}: step {header.step}, k {header.k} of {CHUNK_NUMEL}, codec "
            f"{header.codec_id}, history {header.signals.agreement:08x}{message}"
        )


_FIELDS: tuple[tuple[str, Callable[[_Row], object]], ...] = (
    ("number of islands", lambda row: row.islands),
    ("step", lambda row: row.header.step),
    ("codec", lambda row: row.header.codec_id),
    ("k", lambda row: row.header.k),
    ("history", lambda row: f"{row.header.signals.agreement:08x}"),
    ("number of payloads", lambda row: row.num_payloads),
    ("bytes of the message", lambda row: row.message_bytes),
    ("crc of the payload sizes", lambda row: f"{row.sizes_crc:08x}"),
)
"""What must be equal, in the order in which it is told: what comes later follows from it."""


class Announcement:
    """The headers of all ranks, under way. Construction is collective.

    Args:
        transport: this rank's end of the group.
        header: (64,) uint8, CPU; see `codec.encode_signals`.
        sizes: bytes of the payloads to follow; empty: none follow, or they are not compared.

    Raises:
        ValueError: the header has another size.
        TransportError: the transport is closed, or an earlier call of it has failed.
    """

    def __init__(
        self, transport: Transport, header: torch.Tensor, sizes: Sequence[int] = ()
    ) -> None:
        if header.shape != (codec.HEADER_BYTES,) or header.dtype is not torch.uint8:
            raise ValueError(
                f"header must be uint8 of shape ({codec.HEADER_BYTES},), got {header.dtype} of "
                f"shape {tuple(header.shape)}"
            )
        crc = google_crc32c.value(np.array(sizes, dtype="<u8").tobytes()) if sizes else 0
        tail = torch.frombuffer(
            bytearray(_SIZES.pack(sum(sizes), min(len(sizes), _MOST), transport.world_size, crc)),
            dtype=torch.uint8,
        )
        self._rows = torch.empty((transport.world_size, ROW_BYTES), dtype=torch.uint8)
        self._work = transport.start_common_gather(torch.cat((header, tail)), self._rows)
        self._headers: list[codec.Header] | None = None

    def headers(self) -> list[codec.Header]:
        """Wait for them.

        Returns:
            The header of every rank that took part, in rank order; again and again if asked.

        Raises:
            TransportError, TransportTimeout: the announcement failed.
            WireFormatError: a header is damaged; the rank is named.
            RankMismatchError: step, k, codec, history (`agreement`) or payload sizes differ, or a
                rank sits in another's place. The first field and rank that differ are named.

        Collective: all ranks get a list, or all get the same error.
        """
        if self._headers is None:
            self._work.wait()
            # Ranks that may be lost say whose rows these are.
            places = self._work.took_part or range(len(self._rows))
            rows = [_read(place, row) for place, row in zip(places, self._rows, strict=False)]
            _check_agreement(rows)
            self._headers = [row.header for row in rows]
        return self._headers


def _read(place: int, row: torch.Tensor) -> _Row:
    try:
        header = codec.read_header(row[: codec.HEADER_BYTES])
    except WireFormatError as exc:
        raise WireFormatError(f"the announcement of rank {place} cannot be read: {exc}") from exc
    sizes = _SIZES.unpack(row[codec.HEADER_BYTES :].numpy().tobytes())
    return _Row(place, header, *sizes)


def _check_agreement(rows: Sequence[_Row]) -> None:
    """Every rank must be in the same step with the same history, and sit in its own row."""
    for row in rows:
        if row.header.rank != row.place:
            _refuse(f"rank {row.header.rank} sits in the place of rank {row.place}", rows)
    for name, field in _FIELDS:
        for row in rows[1:]:
            mine, first = field(row), field(rows[0])
            if mine != first:
                _refuse(
                    f"{name} is {mine} on rank {row.place} and {first} on rank {rows[0].place}",
                    rows,
                )


def _refuse(difference: str, rows: Sequence[_Row]) -> None:
    raise RankMismatchError(
        f"ranks no longer agree on their decisions or parameters: {difference}. In full: "
        f"{'; '.join(map(str, rows))}. Restart from the last checkpoint; if it happens again, "
        "compare versions and configuration of the hosts, and let all ranks use the same "
        "parameters in every step."
    )
