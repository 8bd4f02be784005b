"""Payloads of every codec with something changed, most of them with a checksum that fits again."""

from __future__ import annotations

import itertools
import random
import struct
from dataclasses import dataclass

import google_crc32c
import torch

from ds_gradprune import codec
from ds_gradprune.bucket.layout import BucketLayout, lay_out
from ds_gradprune.bucket.select import select
from ds_gradprune.codec import CODECS, HEADER_BYTES
from ds_gradprune.law.signals import RankSignals

SIGNALS = RankSignals(3.5, False, 0.25, 0.125, 0.0625, 4096, 0xDEADBEEF)
LAYOUTS = (
    lay_out((4096,), (True,)),
    lay_out((5000, 7), (True, False)),
    lay_out((120, 3), (True, False)),
    lay_out((9001, 11, 4096), (True, False, True)),
    lay_out((50,), (False,)),
)
SEALED_SHARE = 0.85
"""As from a faulty or foreign sender; the others are what a bad cable delivers."""


@dataclass(frozen=True)
class Whole:
    """A payload as it should be."""

    data: bytes
    layout: BucketLayout
    rank: int = 1


def whole_payloads() -> list[Whole]:
    """Payloads of every codec, layout and some densities, and an announcement."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for written, layout, k in itertools.product(CODECS.values(), LAYOUTS, (1, 41, 205, 2000, 4096)):
        block = select(torch.randn(layout.numel, generator=generator), layout, k)
        payload = written.encode(block, step=12, bucket=3, rank=1, signals=SIGNALS)
        found.append(Whole(payload.numpy().tobytes(), layout))
    told = codec.encode_signals(step=12, rank=1, signals=SIGNALS, k=41)
    return [*found, Whole(told.numpy().tobytes(), LAYOUTS[0])]


def attempt(rng: random.Random, wholes: list[Whole]) -> None:
    """One mutated payload through all entries.

    Args:
        rng: decides which and how.
        wholes: what is mutated.

    Raises:
        WireFormatError: it was refused.
        AssertionError: it was read, and a receiver would write outside of its vector with it.
    """
    whole = rng.choice(wholes)
    data = _mutated(rng, bytearray(whole.data), rng.choice(wholes).data)
    if rng.random() < SEALED_SHARE and len(data) >= HEADER_BYTES:
        crc = google_crc32c.extend(google_crc32c.value(bytes(data[:60])), bytes(data[64:]))
        data[60:64] = struct.pack("<I", crc)
    payload = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()
    header = codec.read_header(payload)
    if header.codec_id == codec.SIGNALS_ID:
        return
    CODECS[header.codec_id].check(header, payload, whole.layout)
    header, block = codec.decode(payload, whole.layout)
    assert header.signals.nonfinite or block.is_finite(), "inf or nan without the flag for it"
    for run in whole.layout.runs(block.k):
        kept = block.indices[run.kept_start : run.kept_stop].view(run.num_rows, run.row_kept)
        assert bool((kept.diff(dim=1) > 0).all()), "a place twice in a row"
        assert not kept.numel() or 0 <= int(kept.min()), "a place before its row"
        assert not kept.numel() or int(kept.max()) < run.row_numel, "a place behind its row"


def _mutated(rng: random.Random, data: bytearray, other: bytes) -> bytearray:
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(8)
        at = rng.randrange(len(data)) if data else 0
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data += rng.randbytes(rng.randint(1, 9))
        elif kind == 3:
            data[at : at + rng.randint(1, 8)] = rng.randbytes(rng.randint(1, 8))
        elif kind == 4:
            data[at:] = other[at:]
        elif kind == 5 and len(data) >= HEADER_BYTES:
            _change_header(rng, data)
        elif kind == 6:
            data[:HEADER_BYTES] = other[:HEADER_BYTES]
        elif kind == 7 and len(data) > HEADER_BYTES:
            body = rng.randrange(HEADER_BYTES, len(data))
            data[body:] = bytes([rng.choice((0, 0xFF, 0x7F, 0x80))]) * (len(data) - body)
    return data


def _change_header(rng: random.Random, data: bytearray) -> None:
    """One field of the header gets a number of its own width."""
    offset, code = rng.choice(
        [(4, "B"), (5, "B"), (6, "H"), (8, "I"), (12, "H"), (14, "H"), (16, "H"), (18, "H")]
        + [(20, "I"), (24, "Q"), (32, "I"), (36, "I")]
        + [(at, "f") for at in range(40, 60, 4)]
    )
    if code == "f":
        value = struct.pack("<f", rng.choice((float("nan"), float("inf"), -1.0, 3e38, 0.0)))
    else:
        most = 2 ** (8 * struct.calcsize(f"<{code}")) - 1
        value = struct.pack(f"<{code}", rng.choice((0, 1, 4096, most, rng.randint(0, most))) & most)
    data[offset : offset + len(value)] = value
