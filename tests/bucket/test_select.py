"""Selection: exact, deterministic, without touching its inputs, in blocks."""

from __future__ import annotations

import math
import tracemalloc
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune.bucket import select as module
from ds_gradprune.bucket.block import Scratch, SparseBlock, empty_block
from ds_gradprune.bucket.layout import CHUNK_NUMEL, BucketLayout, lay_out
from ds_gradprune.bucket.select import select
from ds_gradprune.bucket.topk_torch import top_k
from tests.helpers.buckets import (
    bits,
    dense_positions,
    flat,
    kept_positions,
    layout_by_shape,
    rows_of,
)

pytestmark = pytest.mark.usefixtures("implementation")

SHAPES = [(), (7,), (4096,), (0, 5), (3, 5), (1, 4096), (4, 2048), (3, 1500), (2, 4099), (40, 90)]

layouts = st.lists(st.sampled_from(SHAPES), max_size=6).map(lambda s: layout_by_shape(*s))
counts = st.sampled_from([1, 2, 41, 205, 2048, 4095, 4096])
scales = st.sampled_from([None, 1.0, -1.0, 0.95, 65536.0, 1 / 3])
kinds = st.sampled_from(["normal", "few distinct", "zeros"])


def reference(t: torch.Tensor, bucket: BucketLayout, k: int) -> SparseBlock:
    """Selection in plain words: per row, sort by magnitude and index, keep the first."""
    indices: list[int] = []
    values = [torch.empty(0)]
    for start, length in rows_of(bucket):
        row = t[start : start + length]
        order = sorted(range(length), key=lambda i: (-abs(float(row[i])), i))
        kept = sorted(order[: math.ceil(k * length / CHUNK_NUMEL)])
        indices += kept
        values.append(row[kept])
    return SparseBlock(
        bucket,
        k,
        torch.tensor(indices, dtype=torch.int16),
        torch.cat(values),
        t[dense_positions(bucket)],
    )


def random(bucket: BucketLayout, kind: str = "normal") -> torch.Tensor:
    if kind == "zeros":
        return torch.zeros(bucket.numel)
    if kind == "few distinct":
        return torch.randint(-2, 3, (bucket.numel,)).float()
    return torch.randn(bucket.numel)


def pieces(vector: torch.Tensor, bucket: BucketLayout) -> list[torch.Tensor]:
    """The same numbers in memory of their own, one tensor per segment."""
    return [part.clone() for part in vector.split([s.numel for s in bucket.segments])]


def assert_same(block: SparseBlock, expected: SparseBlock) -> None:
    assert (block.layout, block.k) == (expected.layout, expected.k)
    assert block.indices.dtype == torch.int16
    assert torch.equal(block.indices, expected.indices)
    assert torch.equal(bits(block.values), bits(expected.values))
    assert torch.equal(bits(block.dense), bits(expected.dense))


def test_nothing_is_selected_of_nothing() -> None:
    for bucket in (lay_out([], []), lay_out([0, 0], [True, False])):
        block = select(torch.empty(0), bucket, 7)
        assert block.indices.numel() == block.values.numel() == block.dense.numel() == 0
        assert_same(select(pieces(torch.empty(0), bucket), bucket, 7), block)


@given(layouts, counts, scales, scales, kinds, st.booleans())
def test_select_equals_the_definition(
    bucket: BucketLayout,
    k: int,
    plus_scale: float | None,
    more_scale: float | None,
    kind: str,
    in_pieces: bool,
) -> None:
    """Every product and every sum is rounded on its own, whatever is added, wherever it lies."""
    torch.manual_seed(0)
    tensors = [random(bucket, kind) for _ in range(3)]
    before = [tensor.clone() for tensor in tensors]
    vector, plus, more = tensors
    expected = vector
    kwargs: dict[str, object] = {}
    if plus_scale is not None:
        kwargs |= {"plus": plus, "plus_scale": plus_scale}
        expected = expected + plus * plus_scale
    if more_scale is not None:
        kwargs |= {"more": more, "more_scale": more_scale}
        expected = expected + more * more_scale
    given_as = pieces(vector, bucket) if in_pieces else vector
    assert_same(select(given_as, bucket, k, **kwargs), reference(expected, bucket, k))
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(bits(tensor), bits(old))


@pytest.mark.parametrize("scale", [1.0, 65536.0, 2.0**-10, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sum_is_formed_in_float32(dtype: torch.dtype, scale: float) -> None:
    bucket = layout_by_shape((3, 4096), (5,), (3, 1500))
    vector = torch.randn(bucket.numel).to(dtype)
    plus = torch.randn(bucket.numel) / scale
    expected = reference(vector.float() + scale * plus, bucket, 41)
    assert_same(select(vector, bucket, 41, plus=plus, plus_scale=scale), expected)
    assert_same(select(vector, bucket, 41), reference(vector.float(), bucket, 41))


@pytest.mark.parametrize("k", [1, 41, 4095, 4096])
def test_kept_and_dropped_add_up_to_the_whole(k: int) -> None:
    bucket = layout_by_shape((3, 4096), (9,), (3, 1500))
    vector, plus = torch.randn(bucket.numel), torch.randn(bucket.numel)
    t = vector + plus
    positions, values = flat(select(vector, bucket, k, plus=plus))
    rest = t.clone()
    rest[positions] -= values
    # Every element is either in the rest or sent, the other being 0: no addition rounds.
    rebuilt = rest.clone()
    rebuilt[positions] += values
    assert torch.equal(rebuilt, t)
    assert int((rest == 0.0).sum()) == values.numel()


def test_ties_go_to_the_lowest_index_and_signs_do_not_matter() -> None:
    bucket = lay_out([4096], [True])
    t = torch.zeros(4096)
    t[5::7] = 1.0
    t[6::7] = -1.0
    assert select(t, bucket, 5).indices.tolist() == [5, 6, 12, 13, 19]
    zeros = torch.zeros(4096)
    zeros[:4] = -0.0
    assert select(zeros, bucket, 3).indices.tolist() == [0, 1, 2]
    zeros[:4], zeros[4:] = 0.0, -0.0
    assert select(zeros, bucket, 3).indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize("k", [1, 41, 4096])
def test_nonfinite_elements_are_kept_and_harm_nothing(k: int) -> None:
    bucket = lay_out([8192], [True])
    t = torch.randn(bucket.numel)
    t[100], t[5000] = float("nan"), float("-inf")
    block = select(t, bucket, k)
    assert {100, 5000} <= set(kept_positions(block).tolist())
    assert not block.is_finite()
    all_nan = select(torch.full((bucket.numel,), float("nan")), bucket, k)
    assert all_nan.indices.view(2, k)[0].tolist() == list(range(k))


@given(layouts, counts)
def test_accelerator_way_equals_cpu_way(bucket: BucketLayout, k: int) -> None:
    torch.manual_seed(0)
    vector, plus = random(bucket), random(bucket, "few distinct")
    expected = select(vector, bucket, k, plus=plus)
    # The way of an accelerator, on the CPU: plain torch operations, other blocks.
    with (
        mock.patch.object(module, "kernels_on", return_value=None),
        mock.patch.object(module, "CpuTopK", return_value=top_k),
        mock.patch.object(module, "_CPU_BLOCK_ROWS", module._DEVICE_BLOCK_ROWS),
    ):
        block = select(vector, bucket, k, plus=plus)
    assert_same(block, expected)


@pytest.mark.parametrize("block_rows", [1, 2, 3, 1000])
def test_result_does_not_depend_on_the_blocks(block_rows: int) -> None:
    bucket = layout_by_shape((5, 4096), (3,), (3, 1500), (4, 4096), (2, 4096))
    t = torch.randn(bucket.numel)
    with mock.patch.object(module, "_CPU_BLOCK_ROWS", block_rows):
        assert_same(select(t, bucket, 41), reference(t, bucket, 41))


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    bucket = layout_by_shape((5, 4096), (3,), (3, 1500))
    vector, plus, more = (torch.randn(bucket.numel) for _ in range(3))
    for k in (1, 41, 4096):
        sums = {"plus_scale": 0.95, "more_scale": -1.0}
        block = select(vector.cuda(), bucket, k, plus=plus.cuda(), more=more.cuda(), **sums)
        assert block.values.is_cuda
        on_cpu = SparseBlock(bucket, k, block.indices.cpu(), block.values.cpu(), block.dense.cpu())
        assert_same(on_cpu, select(vector, bucket, k, plus=plus, more=more, **sums))


# --- memory ---------------------------------------------------------------------------------------


def test_a_given_block_is_filled() -> None:
    bucket = layout_by_shape((3, 4096), (9,), (3, 1500))
    scratch = Scratch()
    for seed in range(3):
        t = torch.randn(bucket.numel, generator=torch.Generator().manual_seed(seed))
        out = scratch.block(bucket, 41)
        assert select(t, bucket, 41, out=out) is out
        assert_same(out, reference(t, bucket, 41))


def test_sum_never_exists_at_full_size(implementation: str) -> None:
    bucket = layout_by_shape((1000, 4096))
    vector, plus = torch.randn(bucket.numel), torch.randn(bucket.numel)
    out = empty_block(bucket, 41)
    largest = 0
    load = module._Source.load

    def watched(self: module._Source, segment: int, start: int, filled: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, filled.numel())
        load(self, segment, start, filled)

    tracemalloc.start()
    with mock.patch.object(module._Source, "load", watched):
        select(vector, bucket, 41, plus=plus, plus_scale=0.3, out=out)
    _, numpy_peak = tracemalloc.get_traced_memory()  # numpy reports its arrays, torch does not
    tracemalloc.stop()
    block_numel = module._CPU_BLOCK_ROWS * CHUNK_NUMEL
    assert largest <= block_numel
    assert largest or implementation == "native"
    # Keys are int32, one block; beside them at most the candidates of a block and their copies,
    # fewer than a quarter of its elements each at this k, and one block of rows to settle.
    assert numpy_peak < 3 * 4 * block_numel < 4 * bucket.numel // 5


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vector", "plus", "message"),
    [
        (torch.zeros(10), None, r"vector must be contiguous with shape \(4096,\), got \(10,\)"),
        (torch.zeros(8192)[::2], None, "vector must be contiguous"),
        (torch.zeros(4096).double(), None, r"vector must be torch\.float32 or torch\.bfloat16 or"),
        (torch.zeros(4096), torch.zeros(4095), r"plus must be float32 with shape \(4096,\)"),
        (torch.zeros(4096), torch.zeros(4096).half(), "plus must be float32 with shape"),
        (torch.zeros(4096), torch.zeros(8192)[::2], r"plus must be contiguous"),
        (torch.zeros(4096), torch.zeros(4096, device="meta"), "plus must be on cpu, got meta"),
        ([], None, "vector must have one tensor for each of 1 segments, got 0"),
        ([torch.zeros(4095)], None, r"vector\[0\] must be contiguous with shape \(4096,\)"),
        ([torch.zeros(4096).half()], None, r"vector\[0\] must be torch\.float32, got torch\.float"),
    ],
)
def test_wrong_tensors_are_refused(
    vector: torch.Tensor | list[torch.Tensor], plus: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        select(vector, lay_out([4096], [True]), 5, plus=plus)


def test_pieces_on_two_devices_are_refused() -> None:
    parts = [torch.zeros(5), torch.zeros(6, device="meta")]
    with pytest.raises(ValueError, match=r"vector\[1\] must be on cpu, got meta"):
        select(parts, lay_out([5, 6], [True, True]), 5)


def test_a_block_of_another_layout_or_k_is_refused() -> None:
    bucket, same = lay_out([4096], [True]), lay_out([4096], [True])
    for out in (empty_block(bucket, 6), empty_block(same, 5), empty_block(bucket, 5, "meta")):
        with pytest.raises(ValueError, match="out must be a block of BucketLayout"):
            select(torch.zeros(4096), bucket, 5, out=out)


@pytest.mark.parametrize("k", [0, -1, 4097])
def test_k_outside_its_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=r"k must be in 1 \.\. 4096, got"):
        select(torch.zeros(4096), lay_out([4096], [True]), k)
