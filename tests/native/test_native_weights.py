"""What blocks do to vectors, by the kernels: the bits of the torch references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ds_gradprune.bucket import apply_torch
from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.bucket.dispatch import addresses, tables
from ds_gradprune.bucket.layout import lay_out
from ds_gradprune.native.checksum import checksum, reference
from ds_gradprune.native.library import Block, Floats, Kernels
from tests.helpers.hard_numbers import Hard, same_bits

LAYOUT = lay_out(
    [5000, 63, 8192, 7, 0, 130, 4097, 200_000],
    [True, False, True, True, True, False, True, False],
)
KS = (1, 205, 1024, 4096)
FACTOR = 0.7


def some_block(k: int, seed: int, hard: Hard) -> SparseBlock:
    rng = np.random.default_rng(seed)
    rows = [
        np.sort(rng.permutation(run.row_numel)[: run.row_kept])
        for run in LAYOUT.runs(k)
        for _ in range(run.num_rows)
    ]
    indices = torch.from_numpy(np.concatenate(rows).astype(np.int16))
    values = torch.from_numpy(hard(len(indices), seed))
    return SparseBlock(LAYOUT, k, indices, values, torch.from_numpy(hard(LAYOUT.dense_numel, seed)))


def as_given(block: SparseBlock, factor: float | None, sent: bool = False) -> Block:
    return Block(block.indices.numpy(), block.values.numpy(), block.dense.numpy(), factor, sent)


def split(flat: Floats) -> list[torch.Tensor]:
    """One tensor for each segment, each in memory of its own."""
    return [torch.from_numpy(flat[s.offset : s.offset + s.numel].copy()) for s in LAYOUT.segments]


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("threads", [1, 3])
def test_scatter_add(native: Kernels, hard: Hard, k: int, threads: int) -> None:
    block, vector = some_block(k, 1, hard), hard(LAYOUT.numel, 2)
    want = torch.from_numpy(vector.copy())
    apply_torch.scatter_add(want, block, FACTOR)
    rows, pieces, *_ = tables(LAYOUT, k)
    native.scatter_add(rows, pieces, vector, as_given(block, FACTOR), threads)
    assert same_bits(vector, want.numpy())


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("way", ["one_call", "a_call_each", "own_apart"])
@pytest.mark.parametrize("own_rank", [0, 2])
def test_move(native: Kernels, hard: Hard, k: int, way: str, own_rank: int) -> None:
    blocks = [some_block(k, seed, hard) for seed in range(3)]
    own, shared = split(hard(LAYOUT.numel, 3)), hard(LAYOUT.numel, 4)
    want_own, want_shared = [t.clone() for t in own], torch.from_numpy(shared.copy())
    move = apply_torch.TorchMove(want_own, want_shared, LAYOUT)
    for rank, block in enumerate(blocks):
        move.add(block, FACTOR, rank == own_rank)
    move.close()
    rows, pieces, row_segments, piece_segments = tables(LAYOUT, k)
    given = [as_given(block, FACTOR, rank == own_rank) for rank, block in enumerate(blocks)]
    calls: list[list[Block]] = [[block] for block in given]
    if way == "one_call":
        calls = [given]
    elif way == "own_apart":  # what was sent may differ from what is delivered in its place
        calls = [[as_given(blocks[own_rank], None, True)]]
        calls += [[block._replace(sent=False)] for block in given]
    touched = None if way == "one_call" else np.zeros(native.touched_words(rows, pieces), np.uint64)
    for number, call in enumerate(calls):
        native.move(
            rows,
            pieces,
            addresses(own, LAYOUT, rows, row_segments),
            addresses(own, LAYOUT, pieces, piece_segments),
            shared,
            touched,
            call,
            close=number == len(calls) - 1,
            threads=1 + number % 3,
        )
    assert touched is None or not touched.any()
    assert same_bits(shared, want_shared.numpy())
    assert all(same_bits(t.numpy(), w.numpy()) for t, w in zip(own, want_own, strict=True))


def test_what_no_block_holds_keeps_its_bits(native: Kernels) -> None:
    """Also where own - shared + shared would round."""
    own, shared = np.float32([1e8, 3.0, 1e-3]), np.float32([1.0, 2.0, 1e8])
    rows, pieces = np.array([[0, 1, 3, 1, 0]]), np.empty((0, 2), np.int64)
    block = Block(np.int16([1]), np.float32([2.0]), np.empty(0, np.float32), 0.5, True)
    at = np.array([own.ctypes.data])
    native.move(rows, pieces, at, at[:0], shared, None, [block], close=True)
    assert own.tolist() == np.float32([1e8, 2.0, 1e-3]).tolist()
    assert shared.tolist() == [1.0, 3.0, 1e8]


def test_a_move_without_notes_must_be_whole(native: Kernels) -> None:
    rows, pieces = np.empty((0, 5), np.int64), np.empty((0, 2), np.int64)
    at, shared = np.empty(0, np.int64), np.empty(0, np.float32)
    with pytest.raises(ValueError, match="close must be True where touched is None"):
        native.move(rows, pieces, at, at, shared, None, [], close=False)


@pytest.mark.parametrize("numel", [0, 1, 1000, 2**17, 2**20 + 5])
def test_checksum_is_that_of_torch(native: Kernels, hard: Hard, numel: int) -> None:
    vector = hard(numel, 0)
    want = reference(torch.from_numpy(vector))
    assert [native.checksum(vector, threads=threads) for threads in (1, 3)] == [want, want]
    assert checksum(torch.from_numpy(vector)) == want
    middle = numel // 3
    parts = native.checksum(vector[:middle]), native.checksum(vector[middle:], middle)
    assert sum(parts) % 2**64 == want
    assert native.checksum(vector, 2**32 - 5) == reference(torch.from_numpy(vector), 2**32 - 5)


def test_checksum_sees_every_kind_of_write(native: Kernels) -> None:
    vector = np.random.default_rng(0).standard_normal(10_000, dtype=np.float32)
    before = native.checksum(vector)
    swapped, reversed_, negated, sign, last_bit = (vector.copy() for _ in range(5))
    swapped[[10, 5000]] = vector[[5000, 10]]
    reversed_[:] = vector[::-1]
    negated[[3, 4]] *= -1
    sign[77] *= -1
    last_bit.view(np.uint32)[9999] ^= 1
    changed = (swapped, reversed_, negated, sign, last_bit, vector * 2, np.zeros_like(vector))
    sums = [native.checksum(array) for array in changed]
    assert len({before, *sums}) == len(changed) + 1
