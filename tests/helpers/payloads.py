"""Payloads of every codec for layouts of every kind, and ways to damage them."""

from __future__ import annotations

import struct

import google_crc32c
import pytest
import torch

from ds_gradprune import codec
from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.bucket.layout import BucketLayout
from ds_gradprune.bucket.select import select
from ds_gradprune.codec import CODECS, Codec
from ds_gradprune.errors import WireFormatError
from ds_gradprune.law.signals import RankSignals
from tests.helpers.buckets import layout_by_shape

SIGNALS = RankSignals(
    loss=3.5,
    nonfinite=False,
    compute_time_s=0.25,
    codec_time_s=0.125,
    comm_time_s=0.0625,
    wire_bytes=4096,
    agreement=0xDEADBEEF,
)
"""Times that float32 holds exactly."""


def layout(*shapes: tuple[int, ...]) -> BucketLayout:
    return layout_by_shape(*shapes, min_numel=100)


LAYOUTS = {
    "one row": layout((1, 4096)),
    "rows": layout((5, 4096)),
    "tail": layout((1, 5000)),
    "short": layout((3, 67)),
    "mixed": layout((2, 4096), (7,), (3, 50), (0, 9), (1, 4096), (11,), (1, 9001)),
    "all dense": layout((50,), (3, 3), (101,)),
    "empty": layout((0, 4)),
}
K = (1, 2, 41, 205, 1500, 4095, 4096)
CASES = [
    pytest.param(written, bucket, k, id=f"{written.name}-{name}-{k}")
    for written in CODECS.values()
    for name, bucket in LAYOUTS.items()
    for k in K
]
SMALL = [pytest.param(c, k, id=f"{c.name}-{k}") for c in CODECS.values() for k in (1, 200, 2000)]
"""In a row of 120: one index in plain bits, six by Elias-Fano, 59 in a bitmap."""


def encode(written: Codec, block: SparseBlock, signals: RankSignals = SIGNALS) -> torch.Tensor:
    return written.encode(block, step=12, bucket=3, rank=1, signals=signals)


def through(written: Codec, block: SparseBlock, signals: RankSignals = SIGNALS) -> SparseBlock:
    """What every receiver reads."""
    return codec.decode(encode(written, block, signals), block.layout)[1]


def assert_refused(payload: torch.Tensor, bucket: BucketLayout, message: str) -> None:
    """By `check` and by reading alike."""
    header = codec.read_header(payload)
    written = CODECS[header.codec_id]
    with pytest.raises(WireFormatError, match=message):
        written.check(header, payload, bucket)
    with pytest.raises(WireFormatError, match=message):
        written.read_body(header, payload, bucket)


def small_payload(written: Codec, k: int) -> tuple[torch.Tensor, BucketLayout]:
    """A row of 120 elements, three dense ones, padding."""
    bucket = layout((1, 120), (3,))
    return encode(written, select(torch.randn(bucket.numel), bucket, k)), bucket


def as_tensor(data: bytes | bytearray) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(
        0, dtype=torch.uint8
    )  # fmt: skip


def resealed(data: bytearray) -> torch.Tensor:
    """The same bytes with a crc that fits them, as from a faulty or foreign sender."""
    crc = google_crc32c.extend(google_crc32c.value(bytes(data[:60])), bytes(data[64:]))
    data[60:64] = struct.pack("<I", crc)
    return as_tensor(data)
