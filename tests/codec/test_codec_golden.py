"""Frozen payloads: today's code reads its own version and writes the same bytes.

``WRITE_GOLDEN=1 pytest tests/codec/test_codec_golden.py`` writes files that are not there yet.
Those of a released version are never rewritten.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_gradprune import codec
from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.bucket.layout import BucketLayout, Segment, lay_out
from ds_gradprune.bucket.select import select
from ds_gradprune.codec.header import VERSION
from ds_gradprune.errors import WireFormatError
from ds_gradprune.law.signals import RankSignals

pytestmark = pytest.mark.usefixtures("implementation")

FOLDER = Path(__file__).parents[1] / "golden" / f"v{VERSION}"

LAYOUT = lay_out([4096 + 300, 3, 0, 2], [True, False, True, True])
"""A full row, two short ones, a dense segment between them, an empty one."""

LONG = lay_out([2 * 4096 + 300, 130], [True, False])
"""More values than share a scale, kept and dense."""

SHORT = lay_out([300, 300], [True, True])
"""Rows of one shape that are two runs."""

TINY = lay_out([2, 9], [False, True])

NOTHING = lay_out([], [])

KNOWN = RankSignals(2.75, False, 0.5, 0.125, 0.0625, 70000, 0x89ABCDEF)
UNKNOWN = RankSignals(None, True, None, 0.0, 0.0, 0, 0)
WRITTEN_OUTSIDE = dataclasses.replace(KNOWN, written=True)

WRITTEN: dict[str, tuple[int, BucketLayout, int, RankSignals]] = {
    "signals": (0, NOTHING, 4096, KNOWN),
    "signals-unknown": (0, NOTHING, 4096, UNKNOWN),
    "announcement": (0, NOTHING, 41, WRITTEN_OUTSIDE),
    "fp32-all": (5, TINY, 4096, KNOWN),
    "fp32-elias-fano": (5, LAYOUT, 5, KNOWN),
    "bf16-all": (6, TINY, 4096, UNKNOWN),
    "bf16-plain": (6, LAYOUT, 1, UNKNOWN),
    "bf16-elias-fano": (6, LAYOUT, 5, KNOWN),
    "bf16-bitmap": (6, SHORT, 2000, KNOWN),
    "4bit-elias-fano": (7, LONG, 82, KNOWN),
    "4bit-all": (7, TINY, 4096, KNOWN),
    "2bit-elias-fano": (8, LONG, 82, KNOWN),
}
"""File name -> codec id, layout, k, signals; used when the files are written, not when read."""


def gradient(numel: int) -> torch.Tensor:
    """Numbers by arithmetic, so that no generator's version matters; awkward ones in front."""
    t = torch.tensor([((i * 7919) % 4409 - 2204) / 64 for i in range(numel)])
    awkward = torch.tensor([1e-41, -0.0, 3.4e38, 1.0 + 2.0**-8])
    t[1:5] = awkward[: max(0, numel - 1)]
    return t


def describe(codec_id: int, layout: BucketLayout, k: int, signals: RankSignals) -> dict[str, Any]:
    block = select(gradient(layout.numel), layout, k)
    description: dict[str, Any] = {
        "codec_id": codec_id,
        "step": 1234567,
        "bucket": 17 if codec_id else 0,
        "rank": 3,
        "k": k,
        "signals": dataclasses.asdict(signals),
        "segments": [[s.offset, s.numel, s.pruned] for s in layout.segments],
        "indices": block.indices.tolist(),
        "values": as_hex(block.values),
        "dense": as_hex(block.dense),
    }
    if codec_id:
        _, sent = codec.decode(encoded(description), layout)
        description |= {"sent_values": as_hex(sent.values), "sent_dense": as_hex(sent.dense)}
    return description


def as_hex(values: torch.Tensor) -> list[str]:
    return [f"{bits:08x}" for bits in values.numpy().view(np.uint32).tolist()]


def from_hex(words: list[str]) -> torch.Tensor:
    return torch.from_numpy(np.array([int(w, 16) for w in words], np.uint32).view(np.float32))


def layout_of(description: dict[str, Any]) -> BucketLayout:
    return BucketLayout([Segment(*entry) for entry in description["segments"]])


def encoded(description: dict[str, Any]) -> torch.Tensor:
    signals = RankSignals(**description["signals"])
    step, rank, k = description["step"], description["rank"], description["k"]
    if description["codec_id"] == 0:
        return codec.encode_signals(step=step, rank=rank, signals=signals, k=k)
    block = SparseBlock(
        layout_of(description),
        k,
        torch.tensor(description["indices"], dtype=torch.int16),
        from_hex(description["values"]),
        from_hex(description["dense"]),
    )
    return codec.CODECS[description["codec_id"]].encode(
        block, step=step, bucket=description["bucket"], rank=rank, signals=signals
    )


def golden(name: str) -> tuple[dict[str, Any], bytes]:
    description = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return description, (FOLDER / f"{name}.bin").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def _write_golden() -> None:
    if os.environ.get("WRITE_GOLDEN") != "1":
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in set(WRITTEN) - {path.stem for path in FOLDER.glob("*.bin")}:
        description = describe(*WRITTEN[name])
        text = json.dumps(description, indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        (FOLDER / f"{name}.bin").write_bytes(encoded(description).numpy().tobytes())


def test_every_codec_has_a_golden_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.bin")} == set(WRITTEN)
    ids = {golden(name)[0]["codec_id"] for name in WRITTEN}
    assert ids == {codec.SIGNALS_ID, *codec.CODECS}


@pytest.mark.parametrize("name", WRITTEN)
def test_todays_code_writes_the_same_bytes(name: str) -> None:
    description, data = golden(name)
    assert encoded(description).numpy().tobytes() == data


@pytest.mark.parametrize("name", WRITTEN)
def test_todays_code_reads_the_files(name: str) -> None:
    description, data = golden(name)
    payload = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    header = codec.read_header(payload)
    for field in ("codec_id", "step", "bucket", "rank", "k"):
        assert getattr(header, field) == description[field]
    assert header.signals == RankSignals(**description["signals"])
    if description["codec_id"] == 0:
        return
    _, block = codec.decode(payload, layout_of(description))
    assert block.indices.tolist() == description["indices"]
    assert as_hex(block.values) == description["sent_values"]
    assert as_hex(block.dense) == description["sent_dense"]


@pytest.mark.parametrize("name", [name for name, case in WRITTEN.items() if case[0]])
def test_todays_selection_keeps_the_same_elements(name: str) -> None:
    description, _ = golden(name)
    layout = layout_of(description)
    block = select(gradient(layout.numel), layout, description["k"])
    assert block.indices.tolist() == description["indices"]
    assert as_hex(block.values) == description["values"]


@pytest.mark.parametrize("path", sorted((FOLDER.parent / "v1").glob("*.bin")), ids=lambda p: p.stem)
def test_payloads_of_version_1_are_refused_by_name(path: Path) -> None:
    payload = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    match = r"format version must be 2, got 1\. Install the same release on all hosts\."
    with pytest.raises(WireFormatError, match=match):
        codec.read_header(payload)
    with pytest.raises(WireFormatError, match=match):
        codec.decode(payload, LAYOUT)
