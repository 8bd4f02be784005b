"""Blocks to bytes and back: the table of codecs, and the way in for any payload.

The codec id in a payload's header says how to read it. `header` draws the header.
"""

from __future__ import annotations

import numpy as np
import torch

from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.bucket.layout import CHUNK_NUMEL, BucketLayout
from ds_gradprune.codec.body import Codec
from ds_gradprune.codec.header import HEADER_BYTES, SIGNALS_ID, Header, parse, seal
from ds_gradprune.codec.levels import Levels
from ds_gradprune.codec.values import Bfloat16, Float32
from ds_gradprune.errors import WireFormatError
from ds_gradprune.law.signals import RankSignals

__all__ = [
    "CODECS",
    "HEADER_BYTES",
    "SIGNALS_ID",
    "Codec",
    "Header",
    "codec_for",
    "decode",
    "encode_signals",
    "read_header",
]

_ALL: tuple[Codec, ...] = (
    Codec(5, Float32()),
    Codec(6, Bfloat16()),
    Codec(7, Levels(4)),
    Codec(8, Levels(2), dense=Levels(4)),
)

CODECS: dict[int, Codec] = {codec.codec_id: codec for codec in _ALL}
"""Codec id on the wire -> codec. An id keeps its meaning for ever; 1 to 4 were format 1's."""


def _check_table() -> None:
    """A slip in the table is found when it is imported, not in a training run."""
    names = {codec.name for codec in _ALL}
    ids = [codec.codec_id for codec in _ALL]
    if len(CODECS) < len(_ALL) or len(names) < len(_ALL):
        raise ValueError(f"codec ids and names must be unique, got {ids} and {sorted(names)}.")
    if not all(SIGNALS_ID < codec_id < 256 for codec_id in ids):
        raise ValueError(f"codec ids must be in {SIGNALS_ID + 1} .. 255, got {ids}.")


_check_table()


def codec_for(k: int, value_bits: int) -> Codec:
    """The codec that writes blocks of this k with values of this width in the fewest bytes.

    Raises:
        ValueError: no codec does.
    """
    if not 1 <= k <= CHUNK_NUMEL:
        raise ValueError(f"k must be in 1 .. {CHUNK_NUMEL}, got {k}.")
    for codec in _ALL:
        if codec.values.bits == value_bits:
            return codec
    widths = sorted(codec.values.bits for codec in _ALL)
    raise ValueError(f"value_bits must be one of {widths}, got {value_bits}.")


def decode(payload: torch.Tensor, layout: BucketLayout) -> tuple[Header, SparseBlock]:
    """Read a payload of any codec with a body.

    Args:
        payload: 1-D uint8, CPU; arbitrary bytes.
        layout: the layout that the receiver expects.

    Raises:
        WireFormatError: it is not a whole, undamaged payload for this layout.
    """
    header = read_header(payload)
    if header.codec_id == SIGNALS_ID:
        raise WireFormatError("payload must have a body, got signals only.")
    return header, CODECS[header.codec_id].read_body(header, payload, layout)


def read_header(payload: torch.Tensor) -> Header:
    """Read and check a payload's header, and the crc over all of it; the body is not looked into.

    Raises:
        WireFormatError: it is not a whole, undamaged payload of a known codec.
    """
    header = parse(payload)
    if header.codec_id != SIGNALS_ID and header.codec_id not in CODECS:
        raise WireFormatError(
            f"payload's codec id must be one of {[SIGNALS_ID, *CODECS]}, got {header.codec_id}. "
            "Do all ranks run the same version?"
        )
    return header


def encode_signals(
    *, step: int, rank: int, signals: RankSignals, k: int = CHUNK_NUMEL
) -> torch.Tensor:
    """An announcement: a header without a body, sent before payloads or instead of them.

    Args:
        step: optimizer step, 0 .. 2**32 - 1.
        rank: this rank, 0 .. 65535.
        signals: what this rank measured. Here alone `written` travels.
        k: kept elements per full row that this rank has decided on.

    Returns:
        (HEADER_BYTES,) uint8, CPU.

    Raises:
        ValueError: a number does not fit its field.
    """
    if not 1 <= k <= CHUNK_NUMEL:
        raise ValueError(f"k must be in 1 .. {CHUNK_NUMEL}, got {k}.")
    payload = np.empty(HEADER_BYTES, dtype=np.uint8)
    seal(Header(step, 0, rank, SIGNALS_ID, k, 0, 0, signals), payload)
    return torch.from_numpy(payload)
