"""The payload's format: its header, written and read, and the checks that need no codec.

Knows nothing of transports and of how elements were chosen. All functions are local.

A payload is a header of 64 bytes and a body; all numbers are little endian:

====== ===== ==== ==================================================================================
offset bytes type meaning
====== ===== ==== ==================================================================================
0      4     char magic, "DSGP"
4      1     u8   format version, 2
5      1     u8   codec id, see `codec.CODECS`; 0: an announcement, a header without a body
6      2     u16  flags; bit 0: not finite, bit 1: loss known, bit 2: compute time known, bit 3: the
                  weights were written outside, bit 4: the sender was asked to stop, bit 5: it has
                  seen a rank that asks to take part (these with codec 0 only); all others 0
8      4     u32  step
12     2     u16  bucket
14     2     u16  rank of the sender
16     2     u16  k, kept elements per full row, 1 .. 4096; with codec 0 what the sender decided
18     2     u16  with codec 0 the share of the communication time that hid behind the computation,
                  in parts of 65535; all others 0
20     4     u32  crc32c of the bucket's layout; 0 with codec 0
24     8     u64  elements of the bucket; 0 with codec 0
32     4     u32  bytes of the body
36     4     u32  agreement: running crc of decisions and parameter hashes
40     4     f32  loss; 0 if unknown
44     4     f32  compute time, s; 0 if unknown
48     4     f32  codec time, s
52     4     f32  communication time, s
56     4     f32  wire bytes of the previous step, rounded
60     4     u32  crc32c of bytes 0 .. 59 and of the body
====== ===== ==== ==================================================================================

The body is the values of the kept elements in row order and of the dense segments, as `values` and
`levels` write them; then the places of the kept ones, as `places` writes them; then zeros up to a
multiple of 4 bytes. For a given layout, k and codec it has one size. Values of the body are finite
unless flag bit 0 is set.

Format 1 had 12 bits for every index. Payloads do not outlive their step, and all ranks of a job are
checked for one release before the first: another format's payload is refused, not read.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TypeAlias

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.errors import WireFormatError
from ds_gradprune.law.signals import RankSignals

HEADER_BYTES = 64
MAGIC = b"DSGP"
VERSION = 2
"""Version of the format; ranks with different ones do not get as far as a payload."""
SIGNALS_ID = 0
"""Codec id of a payload without a body."""

_FIELDS = struct.Struct("<4sBBHIHHHHIQIIfffff")
_CRC = struct.Struct("<I")
_NONFINITE, _LOSS_KNOWN, _TIME_KNOWN, _WRITTEN, _STOPS, _ASKS = 1, 2, 4, 8, 16, 32
_FLAGS = _NONFINITE | _LOSS_KNOWN | _TIME_KNOWN
_ANNOUNCED = _FLAGS | _WRITTEN | _STOPS | _ASKS
_WHOLE = 65535
"""A share of 1."""
_F32_MAX = float(np.finfo(np.float32).max)

Bytes: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Header:
    """What a payload says about itself.

    The signals are as they arrive everywhere, the sender included, if it reads its own payload:
    losses and times rounded to float32.

    Attributes:
        step: optimizer step, counted from 1.
        bucket: index of the bucket inside the step.
        rank: the sender.
        codec_id: how the body is written; SIGNALS_ID: there is none.
        k: kept elements per full row.
        numel: elements of the bucket; 0 without a body.
        layout_crc: of the bucket's layout; 0 without a body.
        signals: what the sender measured; `written`, `stops`, `asks` are False, `hidden_time_s` is
            0.0, unless there is no body.
    """

    step: int
    bucket: int
    rank: int
    codec_id: int
    k: int
    numel: int
    layout_crc: int
    signals: RankSignals


def seal(header: Header, payload: Bytes) -> None:
    """Write the header over the first bytes of a payload whose body is complete.

    Raises:
        ValueError: a number does not fit its field.
    """
    signals = header.signals
    body_bytes = payload.size - HEADER_BYTES
    for name, value, bits in (
        ("step", header.step, 32),
        ("bucket", header.bucket, 16),
        ("rank", header.rank, 16),
        ("agreement", signals.agreement, 32),
        ("body_bytes", body_bytes, 32),
    ):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name} must be in 0 .. 2**{bits} - 1, got {value}.")
    flags = (
        _NONFINITE * signals.nonfinite
        | _LOSS_KNOWN * (signals.loss is not None)
        | _TIME_KNOWN * (signals.compute_time_s is not None)
        | _WRITTEN * (signals.written and header.codec_id == SIGNALS_ID)
        | _STOPS * (signals.stops and header.codec_id == SIGNALS_ID)
        | _ASKS * (signals.asks and header.codec_id == SIGNALS_ID)
    )
    fields = _FIELDS.pack(
        MAGIC,
        VERSION,
        header.codec_id,
        flags,
        header.step,
        header.bucket,
        header.rank,
        header.k,
        _share(signals) if header.codec_id == SIGNALS_ID else 0,
        header.layout_crc,
        header.numel,
        body_bytes,
        signals.agreement,
        _f32(signals.loss or 0.0),
        _amount("compute_time_s", signals.compute_time_s or 0.0),
        _amount("codec_time_s", signals.codec_time_s),
        _amount("comm_time_s", signals.comm_time_s),
        _amount("wire_bytes", float(signals.wire_bytes)),
    )
    # The package reads a contiguous array in place, with the CPU's own crc32 instruction.
    crc = google_crc32c.extend(google_crc32c.value(fields), payload[HEADER_BYTES:])
    payload[:HEADER_BYTES] = np.frombuffer(fields + _CRC.pack(crc), dtype=np.uint8)


def parse(payload: torch.Tensor) -> Header:
    """Read a payload's header; checks everything that needs neither a codec nor a layout.

    Args:
        payload: 1-D uint8, CPU; arbitrary bytes.

    Raises:
        WireFormatError: it is not a whole, undamaged payload.
    """
    if payload.dtype is not torch.uint8 or payload.dim() != 1:
        raise ValueError(f"payload must be 1-D uint8, got {payload.dim()}-D {payload.dtype}.")
    data: Bytes = payload.contiguous().numpy()
    if data.size < HEADER_BYTES:
        raise WireFormatError(f"payload must have at least {HEADER_BYTES} bytes, got {data.size}.")
    head = data[:HEADER_BYTES].tobytes()
    (
        magic,
        version,
        codec_id,
        flags,
        step,
        bucket,
        rank,
        k,
        share,
        crc_of_layout,
        numel,
        body_bytes,
        agreement,
        loss,
        *amounts,
    ) = _FIELDS.unpack_from(head)
    if magic != MAGIC:
        raise WireFormatError(f"payload must begin with {MAGIC!r}, got {magic!r}.")
    if version != VERSION:
        raise WireFormatError(
            f"payload's format version must be {VERSION}, got {version}. Install the same release "
            "on all hosts."
        )
    if body_bytes != data.size - HEADER_BYTES:
        raise WireFormatError(
            f"payload must have {HEADER_BYTES + body_bytes} bytes, as its header says, got "
            f"{data.size}."
        )
    (crc,) = _CRC.unpack_from(head, _FIELDS.size)
    actual = google_crc32c.extend(google_crc32c.value(head[: _FIELDS.size]), data[HEADER_BYTES:])
    if crc != actual:
        raise WireFormatError(f"payload's crc32c must be {actual:08x}, got {crc:08x}: damaged.")
    _check_fields(codec_id, flags, k, share, crc_of_layout, numel, body_bytes)
    return Header(
        step,
        bucket,
        rank,
        codec_id,
        k,
        numel,
        crc_of_layout,
        _signals(flags, agreement, loss, amounts, share),
    )


def _check_fields(
    codec_id: int, flags: int, k: int, share: int, crc: int, numel: int, body_bytes: int
) -> None:
    allowed = _ANNOUNCED if codec_id == SIGNALS_ID else _FLAGS
    if flags & ~allowed:
        raise WireFormatError(f"payload's flags must be within {allowed:#x}, got {flags:#x}.")
    if share and codec_id != SIGNALS_ID:
        raise WireFormatError(f"payload's reserved field must be 0, got {share}.")
    if not 1 <= k <= CHUNK_NUMEL:
        raise WireFormatError(f"payload's k must be in 1 .. {CHUNK_NUMEL}, got {k}.")
    if codec_id == SIGNALS_ID and (crc or numel or body_bytes):
        raise WireFormatError("payload without a body must have no layout and no elements.")


def _signals(
    flags: int, agreement: int, loss: float, amounts: list[float], share: int
) -> RankSignals:
    for name, amount in zip(
        ("compute time", "codec time", "comm time", "wire bytes"), amounts, strict=True
    ):
        if not (math.isfinite(amount) and amount >= 0.0):
            raise WireFormatError(f"payload's {name} must be finite and >= 0, got {amount}.")
    compute_time_s, codec_time_s, comm_time_s, wire_bytes = amounts
    for name, known, value in (
        ("loss", flags & _LOSS_KNOWN, loss),
        ("compute time", flags & _TIME_KNOWN, compute_time_s),
    ):
        if not known and value != 0.0:
            raise WireFormatError(f"payload's {name} must be 0 when unknown, got {value}.")
    return RankSignals(
        loss=loss if flags & _LOSS_KNOWN else None,
        nonfinite=bool(flags & _NONFINITE),
        compute_time_s=compute_time_s if flags & _TIME_KNOWN else None,
        codec_time_s=codec_time_s,
        comm_time_s=comm_time_s,
        wire_bytes=int(wire_bytes),
        agreement=agreement,
        written=bool(flags & _WRITTEN),
        stops=bool(flags & _STOPS),
        asks=bool(flags & _ASKS),
        hidden_time_s=comm_time_s * share / _WHOLE,
    )


def _share(signals: RankSignals) -> int:
    """What hid of the communication time, rounded down: it is no more than was measured."""
    if not 0.0 < signals.hidden_time_s < signals.comm_time_s:
        return _WHOLE if signals.hidden_time_s > 0.0 else 0
    return int(_WHOLE * (signals.hidden_time_s / signals.comm_time_s))


def _f32(value: float) -> float:
    """What a float32 field can hold: beyond its range, infinity."""
    return math.copysign(math.inf, value) if abs(value) > _F32_MAX else value


def _amount(name: str, value: float) -> float:
    """A time or a size that every receiver will accept."""
    if not 0.0 <= value <= _F32_MAX:
        raise ValueError(f"{name} must be finite and >= 0, got {value}.")
    return value
