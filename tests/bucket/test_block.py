"""Blocks and the memory they are built in."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ds_gradprune.bucket.block import Scratch, SparseBlock, check_block, empty_block
from ds_gradprune.bucket.layout import lay_out

LAYOUT = lay_out([5000, 3], [True, False])


def test_scratch_grows_and_is_used_again() -> None:
    scratch = Scratch()
    large = scratch.block(LAYOUT, 400)
    check_block(large)
    nbytes = scratch.nbytes
    assert nbytes == (2 + 4) * LAYOUT.num_kept(400) + 4 * 3
    small = scratch.block(LAYOUT, 7)
    check_block(small)
    assert (small.layout, small.k) == (LAYOUT, 7)
    for name in ("indices", "values", "dense"):
        assert getattr(small, name).data_ptr() == getattr(large, name).data_ptr()
    assert scratch.nbytes == nbytes


def test_new_blocks_have_memory_of_their_own() -> None:
    one, two = empty_block(LAYOUT, 7), empty_block(LAYOUT, 7)
    assert one.values.data_ptr() != two.values.data_ptr()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["values", "dense"])
def test_inf_and_nan_are_seen(name: str, value: float) -> None:
    block = empty_block(LAYOUT, 7)
    block.values.fill_(-1.0)
    block.dense.fill_(1.0)
    assert block.is_finite()
    getattr(block, name)[-1] = value
    assert not block.is_finite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.zeros(3)}, r"block\.values must be contiguous torch\.float32 of shape"),
        ({"dense": torch.zeros(3).double()}, r"block\.dense must be .* got torch\.float64"),
        ({"indices": torch.zeros(9, dtype=torch.int32)}, r"block\.indices must be .*torch\.int16"),
        ({"dense": torch.zeros(6)[::2]}, r"block\.dense must be contiguous"),
    ],
)
def test_blocks_that_contradict_themselves_are_refused(
    changes: dict[str, torch.Tensor], message: str
) -> None:
    block: SparseBlock = dataclasses.replace(empty_block(LAYOUT, 7), **changes)
    with pytest.raises(ValueError, match=message):
        check_block(block)
