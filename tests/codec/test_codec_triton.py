"""Bodies written and read by the accelerator's kernels: the CPU's bytes, the CPU's bits."""

from __future__ import annotations

import os
from unittest import mock

import numpy as np
import pytest
import torch

from ds_gradprune import codec
from ds_gradprune.bucket.block import SparseBlock, empty_block
from ds_gradprune.bucket.layout import BucketLayout, lay_out
from ds_gradprune.bucket.select import select
from ds_gradprune.codec.body import Codec
from ds_gradprune.errors import WireFormatError
from ds_gradprune.law.signals import RankSignals
from tests.helpers.buckets import bits, interpreter
from tests.helpers.hard_numbers import HARD

__all__ = ["interpreter"]

# The interpreter computes in numpy, which warns of overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LAYOUTS = {
    "mixed": lay_out([5000, 7, 9 * 4096, 0, 200, 9], [True, False, True, True, False, True]),
    "short": lay_out([300] * 11 + [77], [True] * 12),
    "dense": lay_out([133], [False]),
}  # fmt: skip
KINDS = [kind for kind in HARD if kind != "nonfinite"]
SIGNALS = RankSignals(3.0, True, 0.1, 0.01, 0.02, 100_000, 0)
CODECS = list(codec.CODECS.values())


def off() -> mock._patch_dict:
    return mock.patch.dict(os.environ, DS_GRADPRUNE_TRITON="0")


def block_of(layout: BucketLayout, kind: str, k: int) -> SparseBlock:
    numbers = torch.from_numpy(np.ascontiguousarray(HARD[kind](layout.numel, k)))
    with off():
        return select(numbers, layout, k)


def encoded(writer: Codec, block: SparseBlock) -> torch.Tensor:
    return writer.encode(block, step=1, bucket=0, rank=0, signals=SIGNALS)


def assert_codes_alike(writer: Codec, block: SparseBlock, device: str) -> None:
    layout, k = block.layout, block.k
    with off():
        payload = encoded(writer, block)
        header = codec.read_header(payload)
        expected = writer.read_body(header, payload, layout)
    there = (tensor.to(device) for tensor in (block.indices, block.values, block.dense))
    got = encoded(writer, SparseBlock(layout, k, *there))
    assert got.device.type == "cpu"
    assert torch.equal(got, payload)
    for checked in (False, True):
        out = empty_block(layout, k, device)
        read = writer.read_body(header, payload, layout, out=out, checked=checked)
        assert read is out
        assert torch.equal(read.indices.cpu(), expected.indices)
        assert torch.equal(bits(read.values.cpu()), bits(expected.values))
        assert torch.equal(bits(read.dense.cpu()), bits(expected.dense))


@pytest.mark.parametrize("kind", KINDS)
def test_levels_are_the_cpu_s(interpreter: None, kind: str) -> None:
    layout = LAYOUTS["mixed" if kind == "normal" else "short"]
    for writer in CODECS[2:]:
        for k in (41, 2048):
            assert_codes_alike(writer, block_of(layout, kind, k), "cpu")


@pytest.mark.parametrize("k", [1, 3, 4, 41, 205, 1024, 1025, 4096])
def test_places_are_the_cpu_s(interpreter: None, k: int) -> None:
    for number, layout in enumerate(LAYOUTS.values()):
        writer = CODECS[(k + number) % 2]
        assert_codes_alike(writer, block_of(layout, "normal", k), "cpu")


def test_nan_is_refused_or_stays_nan(interpreter: None) -> None:
    layout = LAYOUTS["mixed"]
    block = block_of(layout, "nonfinite", 205)
    for writer in CODECS:
        payload = encoded(writer, block)
        header = codec.read_header(payload)
        writer.check(header, payload, layout)
        read = writer.read_body(header, payload, layout, out=empty_block(layout, 205))
        assert bool(read.values[block.values.isnan()].isnan().all())


def test_damaged_places_are_refused_before_they_are_used(interpreter: None) -> None:
    layout = LAYOUTS["mixed"]
    payload = encoded(CODECS[1], block_of(layout, "normal", 41))
    header = codec.read_header(payload)
    start = CODECS[1]._cuts(layout, 41)[1]
    payload[start:-4] = 255
    with pytest.raises(WireFormatError, match="payload"):
        CODECS[1].read_body(header, payload, layout, out=empty_block(layout, 41))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_bodies_on_a_gpu_are_the_cpu_s(kind: str) -> None:
    large = lay_out([50 * 4096, 777, 5000, 40 * 4096], [True, False, True, True])
    for layout in (*LAYOUTS.values(), large):
        for k in (1, 3, 4, 41, 205, 1024, 1025, 4096):
            for writer in CODECS:
                assert_codes_alike(writer, block_of(layout, kind, k), "cuda")
