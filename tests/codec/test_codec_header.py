"""The header: signals and announcements, what fits, and every field checked."""

from __future__ import annotations

import dataclasses
import math
import struct

import pytest
import torch

from ds_gradprune import codec
from ds_gradprune.bucket.select import select
from ds_gradprune.codec import HEADER_BYTES, codec_for
from ds_gradprune.errors import WireFormatError
from tests.helpers.payloads import SIGNALS, encode, layout, resealed, small_payload


@pytest.mark.parametrize("nonfinite", [False, True])
@pytest.mark.parametrize("loss", [None, 0.0, -2.5, math.inf])
@pytest.mark.parametrize("compute_time_s", [None, 0.0, 0.5])
def test_signals_travel_alone_and_with_a_block(
    nonfinite: bool, loss: float | None, compute_time_s: float | None
) -> None:
    signals = dataclasses.replace(
        SIGNALS, nonfinite=nonfinite, loss=loss, compute_time_s=compute_time_s
    )
    alone = codec.encode_signals(step=9, rank=2, signals=signals)
    assert alone.shape == (HEADER_BYTES,)
    header = codec.read_header(alone)
    assert header.signals == signals
    assert (header.step, header.rank, header.bucket) == (9, 2, 0)
    assert (header.codec_id, header.numel, header.layout_crc) == (0, 0, 0)
    bucket = layout((1, 120))
    block = select(torch.zeros(120), bucket, 5)
    assert codec.read_header(encode(codec_for(5, 16), block, signals)).signals == signals


def test_signals_are_rounded_to_float32() -> None:
    signals = dataclasses.replace(
        SIGNALS, loss=1e300, compute_time_s=0.1, wire_bytes=2**24 + 1, codec_time_s=1e-60
    )
    arrived = codec.read_header(codec.encode_signals(step=1, rank=0, signals=signals)).signals
    assert arrived.loss == math.inf
    assert arrived.compute_time_s == struct.unpack("<f", struct.pack("<f", 0.1))[0]
    assert arrived.wire_bytes == 2**24
    assert arrived.codec_time_s == 0.0
    unknown = dataclasses.replace(SIGNALS, loss=math.nan)
    loss = codec.read_header(codec.encode_signals(step=1, rank=0, signals=unknown)).signals.loss
    assert loss is not None
    assert math.isnan(loss)


@pytest.mark.parametrize("k", [1, 41, 4096])
@pytest.mark.parametrize("flags", [{}, {"written": True}, {"stops": True}, {"asks": True}])
def test_announcements_carry_k_and_flags(k: int, flags: dict[str, bool]) -> None:
    signals = dataclasses.replace(SIGNALS, **flags)
    header = codec.read_header(codec.encode_signals(step=9, rank=2, signals=signals, k=k))
    assert (header.codec_id, header.k, header.signals) == (codec.SIGNALS_ID, k, signals)
    block = select(torch.zeros(120), layout((1, 120)), 5)
    payload = encode(codec_for(5, 16), block, signals)
    assert codec.read_header(payload).signals == SIGNALS  # announcements alone carry it


@pytest.mark.parametrize(
    ("hidden_s", "arrives"), [(0.0, 0.0), (0.25, 0.25), (0.75, 0.75), (2.0, 1.0)]
)
def test_announcements_carry_what_hid_of_the_exchange(hidden_s: float, arrives: float) -> None:
    signals = dataclasses.replace(SIGNALS, comm_time_s=1.0, hidden_time_s=hidden_s)
    arrived = codec.read_header(codec.encode_signals(step=9, rank=2, signals=signals)).signals
    assert arrives - 1.0 / 65535 <= arrived.hidden_time_s <= arrives  # no more than was measured
    block = select(torch.zeros(120), layout((1, 120)), 5)
    payload = encode(codec_for(5, 16), block, signals)
    assert codec.read_header(payload).signals.hidden_time_s == 0.0


@pytest.mark.parametrize("k", [0, 4097])
def test_announced_k_must_be_one(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be in 1 \.\. 4096, got {k}"):
        codec.encode_signals(step=9, rank=2, signals=SIGNALS, k=k)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, r"step must be in 0 \.\. 2\*\*32 - 1, got -1"),
        ({"step": 2**32}, r"step must be in 0 \.\. 2\*\*32 - 1, got 4294967296"),
        ({"bucket": 65536}, r"bucket must be in 0 \.\. 2\*\*16 - 1, got 65536"),
        ({"rank": 65536}, r"rank must be in 0 \.\. 2\*\*16 - 1, got 65536"),
        ({"out": torch.empty(3, dtype=torch.uint8)}, r"out must be contiguous uint8 of shape"),
        (
            {"signals": dataclasses.replace(SIGNALS, agreement=-1)},
            r"agreement must be in 0 \.\. 2\*\*32 - 1, got -1",
        ),
        (
            {"signals": dataclasses.replace(SIGNALS, comm_time_s=math.nan)},
            r"comm_time_s must be finite and >= 0, got nan",
        ),
        (
            {"signals": dataclasses.replace(SIGNALS, wire_bytes=-1)},
            r"wire_bytes must be finite and >= 0, got -1\.0",
        ),
    ],
)
def test_what_does_not_fit_the_header_is_refused(changes: dict[str, object], message: str) -> None:
    block = select(torch.zeros(120), layout((1, 120)), 5)
    arguments = {"step": 1, "bucket": 0, "rank": 0, "signals": SIGNALS} | changes
    with pytest.raises(ValueError, match=message):
        codec_for(5, 16).encode(block, **arguments)  # type: ignore[arg-type]


def forged(offset: int, fmt: str, value: object) -> torch.Tensor:
    payload, _ = small_payload(codec_for(7, 16), 200)
    data = bytearray(payload.numpy().tobytes())
    struct.pack_into(fmt, data, offset, value)
    return resealed(data)


@pytest.mark.parametrize(
    ("offset", "fmt", "value", "message"),
    [
        (0, "<4s", b"GSPD", r"must begin with b'DSGP', got b'GSPD'"),
        (4, "<B", 1, r"format version must be 2, got 1\. Install the same release"),
        (5, "<B", 99, r"codec id must be one of \[0, 5, 6, 7, 8\], got 99"),
        (5, "<B", 0, "without a body must have no layout and no elements"),
        (5, "<B", 3, r"codec id must be one of \[0, 5, 6, 7, 8\], got 3"),
        (5, "<B", 5, "must have 108 bytes with codec fp32 at k = 200, got 88"),
        (6, "<H", 8, "flags must be within 0x7, got 0x8"),
        (6, "<H", 4, r"loss must be 0 when unknown, got 3\.5"),
        (6, "<H", 2, r"compute time must be 0 when unknown, got 0\.25"),
        (16, "<H", 0, r"k must be in 1 \.\. 4096, got 0"),
        (16, "<H", 4097, r"k must be in 1 \.\. 4096, got 4097"),
        (16, "<H", 4000, "must have .* bytes with codec bf16 at k = 4000, got 88"),
        (18, "<H", 1, "reserved field must be 0, got 1"),
        (20, "<I", 7, "layout must be this rank's .* crc 00000007. Do all ranks run the same"),
        (24, "<Q", 122, "layout must be this rank's .*, got 122 elements"),
        (32, "<I", 29, "must have 93 bytes, as its header says, got 88"),
        (44, "<f", math.nan, "compute time must be finite and >= 0, got nan"),
        (48, "<f", -1.0, r"codec time must be finite and >= 0, got -1\.0"),
        (52, "<f", math.inf, "comm time must be finite and >= 0, got inf"),
        (56, "<f", -math.inf, "wire bytes must be finite and >= 0, got -inf"),
    ],
)
def test_every_field_is_checked(offset: int, fmt: str, value: object, message: str) -> None:
    payload = forged(offset, fmt, value)
    with pytest.raises(WireFormatError, match=message):
        codec.decode(payload, layout((1, 120), (3,)))


def test_payloads_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="payload must be 1-D uint8, got 2-D"):
        codec.read_header(torch.zeros(1, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="payload must be 1-D uint8, got 1-D"):
        codec.read_header(torch.zeros(64))


def test_a_strided_payload_is_read() -> None:
    payload, bucket = small_payload(codec_for(7, 16), 7)
    strided = torch.stack([payload, payload], dim=1)[:, 0]
    assert torch.equal(
        codec.decode(strided, bucket)[1].values, codec.decode(payload, bucket)[1].values
    )
