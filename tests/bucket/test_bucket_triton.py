"""The accelerator's kernels in Triton's interpreter and on a GPU: the bits of the CPU's."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from unittest import mock

import numpy as np
import pytest
import torch

from ds_gradprune.bucket import apply_torch
from ds_gradprune.bucket.apply import Move, move_at_once, scatter_add
from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.bucket.layout import BucketLayout, lay_out
from ds_gradprune.bucket.select import select
from ds_gradprune.native import accelerator
from tests.helpers.buckets import bits
from tests.helpers.hard_numbers import HARD

# The interpreter computes in numpy, which warns of overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LAYOUT = lay_out([5000, 7, 2 * 4096, 0, 9, 4, 6], [True, False, True, True, True, False, False])
"""Full and short rows that begin anywhere, dense neighbours, an empty segment."""
ALIGNED = lay_out([4096, 8, 6000], [True, False, True])

KINDS = [*HARD, "bfloat16", "float16"]
SUMS = [
    {},
    {"plus_scale": -1.0},
    {"plus_scale": 0.95, "more_scale": 1 / 3},
]


def numbers(kind: str, numel: int, seed: int) -> torch.Tensor:
    if kind in HARD:
        return torch.from_numpy(np.ascontiguousarray(HARD[kind](numel, seed)))
    normal = torch.from_numpy(HARD["normal"](numel, seed))
    return normal.to({"bfloat16": torch.bfloat16, "float16": torch.float16}[kind])


def on(block: SparseBlock, device: str) -> SparseBlock:
    there = (tensor.to(device) for tensor in (block.indices, block.values, block.dense))
    return SparseBlock(block.layout, block.k, *there)


def assert_alike(got: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits; nan is nan, whichever."""
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(bits(got)[~nan], bits(expected)[~nan])


def assert_selects_alike(
    layout: BucketLayout, kind: str, k: int, sums: dict[str, float], device: str, *, apart: bool
) -> None:
    vector, plus, more = (numbers(kind, layout.numel, seed) for seed in (k, k + 1, k + 2))
    tensors: dict[str, torch.Tensor] = {}
    if "plus_scale" in sums:
        tensors["plus"] = plus.float()
    if "more_scale" in sums:
        tensors["more"] = more.float()
    with mock.patch.dict(os.environ, DS_GRADPRUNE_TRITON="0"):
        expected = select(vector, layout, k, **tensors, **sums)
    there = {name: tensor.to(device) for name, tensor in tensors.items()}
    given: torch.Tensor | list[torch.Tensor] = vector.to(device)
    if apart and vector.dtype is torch.float32:
        sizes = [segment.numel for segment in layout.segments]
        given = [part.clone() for part in vector.to(device).split(sizes)]
    block = on(select(given, layout, k, **there, **sums), "cpu")
    assert_alike(block.values, expected.values)
    assert_alike(block.dense, expected.dense)
    # Of several nan whose bits differ, a processor may prefer any.
    if not expected.values.isnan().any():
        assert torch.equal(block.indices, expected.indices)


def exchange(
    layout: BucketLayout, k: int, count: int, rank: int, device: str, *, whole: bool
) -> list[torch.Tensor]:
    """Own and shared weights after a move, and after a block is added to them."""
    rng = torch.Generator().manual_seed(k + count)
    start = torch.randn(layout.numel, generator=rng)
    islands = [start + 0.01 * torch.randn(layout.numel, generator=rng) for _ in range(count)]
    with mock.patch.dict(os.environ, DS_GRADPRUNE_TRITON="0"):
        blocks = [select(own, layout, k, plus=start, plus_scale=-1.0) for own in islands]
    there = [on(block, device) for block in blocks]
    shared = start.to(device)
    own = [
        part.clone().to(device)
        for part in islands[rank].split([segment.numel for segment in layout.segments])
    ]
    if whole:
        move_at_once(own, shared, there, rank=rank, factor=0.7)
    else:
        move = Move(own, shared, layout)
        for number, block in enumerate(there):
            move.add(block, 0.7, is_own=number == rank)
        move.close()
    scatter_add(shared, there[0], -1 / 3)
    return [tensor.cpu() for tensor in (*own, shared)]


def assert_moves_alike(layout: BucketLayout, k: int, count: int, device: str) -> None:
    rank = count - 1
    with mock.patch.dict(os.environ, DS_GRADPRUNE_TRITON="0"):
        expected = exchange(layout, k, count, rank, "cpu", whole=True)
    for whole in (True, False):
        for got, right in zip(
            exchange(layout, k, count, rank, device, whole=whole), expected, strict=True
        ):
            assert torch.equal(bits(got), bits(right))


@pytest.mark.parametrize("kind", KINDS)
def test_selection_is_the_cpu_s(interpreter: None, kind: str) -> None:
    ks = (1, 2, 41, 205, 2048, 4095, 4096)
    nth = KINDS.index(kind)
    for k in ks[nth % 2 :: 2]:
        for sums in (SUMS[0], SUMS[1 + (nth + k) % 2]):
            assert_selects_alike(LAYOUT, kind, k, sums, "cpu", apart=bool(k % 2))
    assert_selects_alike(ALIGNED, kind, 41, {}, "cpu", apart=False)


@pytest.mark.parametrize(("k", "count"), [(1, 1), (41, 2), (300, 3), (1500, 4), (41, 5), (4096, 2)])
def test_moves_are_the_cpu_s(interpreter: None, k: int, count: int) -> None:
    assert_moves_alike(LAYOUT, k, count, "cpu")


def test_nothing_is_done_with_nothing(interpreter: None) -> None:
    for layout in (lay_out([], []), lay_out([0, 0], [True, False])):
        empty = torch.empty(0)
        block = select(empty, layout, 7)
        scatter_add(empty, block)
        own: Sequence[torch.Tensor] = [torch.empty(0) for _ in layout.segments]
        move = Move(own, empty, layout)
        move.add(block, 1.0, is_own=True)
        move.close()
        move_at_once(own, empty, [block], rank=0, factor=1.0)


def test_the_switch_turns_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_GRADPRUNE_TRITON", "0")
    assert not accelerator.is_on(torch.device("cuda"))
    assert not accelerator.is_on(torch.device("cpu"))
    monkeypatch.delenv("DS_GRADPRUNE_TRITON")
    assert not accelerator.is_on(torch.device("cpu"))
    assert not accelerator.is_on(torch.device("meta"))


def test_one_warning_says_that_triton_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("DS_GRADPRUNE_TRITON", raising=False)
    monkeypatch.setitem(sys.modules, "ds_gradprune.native.device.select", None)
    accelerator._has_triton.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert [accelerator.is_on(torch.device("cuda")) for _ in range(3)] == [False] * 3
    finally:
        accelerator._has_triton.cache_clear()
    (record,) = caplog.records
    assert "the Triton kernels are off" in record.getMessage()
    assert "pip install triton" in record.getMessage()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_selection_on_a_gpu_is_the_cpu_s(kind: str) -> None:
    layout = lay_out([50 * 4096, 77, 5000, 40 * 4096], [True, False, True, True])
    for bucket in (LAYOUT, ALIGNED, layout):
        for k in (1, 41, 205, 2048, 4095, 4096):
            for sums in SUMS:
                for apart in (True, False):
                    assert_selects_alike(bucket, kind, k, sums, "cuda", apart=apart)


@pytest.mark.gpu
def test_moves_on_a_gpu_are_the_cpu_s() -> None:
    layout = lay_out([50 * 4096, 77, 5000, 40 * 4096], [True, False, True, True])
    for bucket in (LAYOUT, ALIGNED, layout):
        for k in (1, 41, 205, 1500, 4096):
            for count in (1, 2, 3, 4, 5):
                assert_moves_alike(bucket, k, count, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("switch", ["0", "1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_added_block_leaves_its_neighbours_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, switch: str
) -> None:
    vector = torch.full((ALIGNED.numel,), -0.0)
    vector[::3] = 1e-40  # not normal, and 0.0 in float16
    for k in (1, 41, 1024):
        block = select(numbers("normal", ALIGNED.numel, k), ALIGNED, k)
        expected = vector.to(dtype)
        scatter_add(expected, block, 1e-38)
        monkeypatch.setenv("DS_GRADPRUNE_TRITON", switch)
        got = vector.to(dtype).cuda()
        scatter_add(got, on(block, "cuda"), 1e-38)
        assert torch.equal(got.cpu().view(torch.int16), expected.view(torch.int16))


@pytest.mark.gpu
def test_the_reference_on_a_gpu_is_what_runs_without_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DS_GRADPRUNE_TRITON", "0")
    own = [torch.zeros(segment.numel, device="cuda") for segment in LAYOUT.segments]
    move = Move(own, torch.zeros(LAYOUT.numel, device="cuda"), LAYOUT)
    assert isinstance(move._how, apply_torch.TorchMove)
    for k in (41, 4096):
        assert_selects_alike(LAYOUT, "ties", k, SUMS[1], "cuda", apart=True)
        assert_moves_alike(LAYOUT, k, 2, "cuda")
