"""Selection: exact, deterministic, without touching its inputs, in blocks."""

from __future__ import annotations

import math
import tracemalloc
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune import sparsify
from ds_gradprune.records import CHUNK_NUMEL, BucketLayout, Segment, SparseBlock
from ds_gradprune.rows import num_kept
from ds_gradprune.sparsify import dense_positions, kept_positions, layout_of, select
from ds_gradprune.topk import top_k

SHAPES = [(), (7,), (4096,), (0, 5), (3, 5), (1, 4096), (4, 2048), (3, 1500), (2, 4099), (40, 90)]
MIN_NUMEL = 1000


def layout(*shapes: tuple[int, ...]) -> BucketLayout:
    return layout_of([torch.Size(shape) for shape in shapes], MIN_NUMEL)


layouts = st.lists(st.sampled_from(SHAPES), max_size=6).map(lambda shapes: layout(*shapes))
counts = st.sampled_from([1, 2, 41, 205, 2048, 4095, 4096])


def rows_of(bucket: BucketLayout) -> list[tuple[int, int]]:
    """(first element, length) of every row, straight from the definition."""
    return [
        (start, min(CHUNK_NUMEL, segment.offset + segment.numel - start))
        for segment in bucket.segments
        if segment.pruned
        for start in range(segment.offset, segment.offset + segment.numel, CHUNK_NUMEL)
    ]


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
    dense = [t[s.offset : s.offset + s.numel] for s in bucket.segments if not s.pruned]
    return SparseBlock(
        bucket,
        k,
        torch.tensor(indices, dtype=torch.int16),
        torch.cat(values),
        torch.cat([torch.empty(0), *dense]),
    )


def random(bucket: BucketLayout, kind: str = "normal") -> torch.Tensor:
    if kind == "zeros":
        return torch.zeros(bucket.numel)
    if kind == "few distinct":
        return torch.randint(-2, 3, (bucket.numel,)).float()
    return torch.randn(bucket.numel)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.int32)


def assert_same(block: SparseBlock, expected: SparseBlock) -> None:
    assert block.indices.dtype == torch.int16
    assert torch.equal(block.indices, expected.indices)
    assert torch.equal(bits(block.values), bits(expected.values))
    assert torch.equal(bits(block.dense), bits(expected.dense))


# --- layout ---------------------------------------------------------------------------------------


def test_layout_sends_small_and_flat_tensors_whole() -> None:
    bucket = layout((10, 100), (10, 99), (5000,), (), (0, 7), (2, 2, 250))
    assert [s.pruned for s in bucket.segments] == [True, False, False, False, False, True]
    assert [s.numel for s in bucket.segments] == [1000, 990, 5000, 1, 0, 1000]
    assert [s.offset for s in bucket.segments] == [0, 1000, 1990, 6990, 6991, 6991]
    assert (bucket.numel, bucket.pruned_numel, bucket.dense_numel) == (7991, 2000, 5991)


def test_layout_of_nothing_is_empty() -> None:
    bucket = layout_of([], 1)
    assert bucket == BucketLayout((), 0)
    assert num_kept(bucket, 7) == 0
    block = select(torch.empty(0), bucket, 7)
    assert block.indices.numel() == block.values.numel() == block.dense.numel() == 0


@given(layouts, counts)
def test_num_kept_follows_the_definition(bucket: BucketLayout, k: int) -> None:
    expected = sum(math.ceil(k * length / CHUNK_NUMEL) for _, length in rows_of(bucket))
    assert num_kept(bucket, k) == expected


@pytest.mark.parametrize("k", [0, -1, 4097])
def test_k_outside_its_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=r"k must be in 1 \.\. 4096, got"):
        num_kept(layout((1, 4096)), k)
    with pytest.raises(ValueError, match=r"k must be in 1 \.\. 4096, got"):
        select(torch.zeros(4096), layout((1, 4096)), k)


@given(layouts, counts)
def test_positions_find_what_was_kept(bucket: BucketLayout, k: int) -> None:
    torch.manual_seed(0)
    t = torch.randn(bucket.numel)
    block = select(t, bucket, k)
    positions = kept_positions(bucket, k, block.indices)
    assert positions.dtype == torch.int64
    assert torch.equal(t[positions], block.values)
    assert bool((positions.diff() > 0).all())
    assert torch.equal(t[dense_positions(bucket)], block.dense)
    whole = kept_positions(bucket, 4096, select(t, bucket, 4096).indices)
    everywhere = torch.cat([whole, dense_positions(bucket)])
    assert everywhere.sort().values.tolist() == list(range(bucket.numel))


def test_positions_of_another_k_are_refused() -> None:
    with pytest.raises(ValueError, match=r"indices must have shape \(5,\), got \(4,\)"):
        kept_positions(layout((1, 4096)), 5, torch.zeros(4, dtype=torch.int16))


# --- selection ------------------------------------------------------------------------------------


@given(layouts, counts, st.booleans(), st.sampled_from(["normal", "few distinct", "zeros"]))
def test_select_equals_the_definition(
    bucket: BucketLayout, k: int, with_addend: bool, kind: str
) -> None:
    torch.manual_seed(0)
    vector, addend = random(bucket, kind), random(bucket, kind)
    before = vector.clone(), addend.clone()
    block = select(vector, bucket, k, addend=addend if with_addend else None)
    assert_same(block, reference(vector + addend if with_addend else vector, bucket, k))
    assert (block.layout, block.k) == (bucket, k)
    assert torch.equal(bits(vector), bits(before[0]))
    assert torch.equal(bits(addend), bits(before[1]))


@pytest.mark.parametrize("scale", [1.0, 65536.0, 2.0**-10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sum_is_formed_in_float32(dtype: torch.dtype, scale: float) -> None:
    bucket = layout((3, 4096), (5,), (3, 1500))
    vector = torch.randn(bucket.numel).to(dtype)
    addend = torch.randn(bucket.numel) / scale
    expected = reference(vector.float() + scale * addend, bucket, 41)
    assert_same(select(vector, bucket, 41, addend=addend, scale=scale), expected)
    assert_same(select(vector, bucket, 41), reference(vector.float(), bucket, 41))


@pytest.mark.parametrize("k", [1, 41, 4095, 4096])
def test_kept_and_dropped_add_up_to_the_whole(k: int) -> None:
    bucket = layout((3, 4096), (9,), (3, 1500))
    vector, addend = torch.randn(bucket.numel), torch.randn(bucket.numel)
    block = select(vector, bucket, k, addend=addend)
    t = vector + addend
    rest = t.clone()
    rest[kept_positions(bucket, k, block.indices)] -= block.values
    rest[dense_positions(bucket)] -= block.dense
    rebuilt = rest.clone()
    rebuilt[kept_positions(bucket, k, block.indices)] += block.values
    rebuilt[dense_positions(bucket)] += block.dense
    # Every element is either in the rest or sent, the other being 0: no addition rounds.
    assert torch.equal(rebuilt, t)
    assert int((rest == 0.0).sum()) == block.values.numel() + block.dense.numel()


def test_no_dropped_element_is_larger_than_a_kept_one_of_its_row() -> None:
    bucket = layout((5, 4096), (3, 1500))
    t = torch.randn(bucket.numel)
    block = select(t, bucket, 20)
    rest = t.abs()
    rest[kept_positions(bucket, 20, block.indices)] = -1.0
    first = 0
    for start, length in rows_of(bucket):
        kept = math.ceil(20 * length / CHUNK_NUMEL)
        smallest = block.values[first : first + kept].abs().min()
        assert rest[start : start + length].max() < smallest
        first += kept


def test_ties_go_to_the_lowest_index_and_signs_do_not_matter() -> None:
    t = torch.zeros(4096)
    t[5::7] = 1.0
    t[6::7] = -1.0
    block = select(t, layout((1, 4096)), 5)
    assert block.indices.tolist() == [5, 6, 12, 13, 19]
    zeros = torch.zeros(4096)
    zeros[:4] = -0.0
    assert select(zeros, layout((1, 4096)), 3).indices.tolist() == [0, 1, 2]
    zeros[:4], zeros[4:] = 0.0, -0.0
    assert select(zeros, layout((1, 4096)), 3).indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize("k", [1, 41, 4096])
def test_nonfinite_elements_are_kept_and_harm_nothing(k: int) -> None:
    bucket = layout((2, 4096))
    t = torch.randn(bucket.numel)
    t[100], t[5000] = float("nan"), float("-inf")
    block = select(t, bucket, k)
    positions = kept_positions(bucket, k, block.indices)
    assert {100, 5000} <= set(positions.tolist())
    all_nan = select(torch.full((bucket.numel,), float("nan")), bucket, k)
    assert all_nan.indices.view(2, k)[0].tolist() == list(range(k))


@given(layouts, counts)
def test_accelerator_way_equals_cpu_way(bucket: BucketLayout, k: int) -> None:
    torch.manual_seed(0)
    vector, addend = random(bucket), random(bucket, "few distinct")
    expected = select(vector, bucket, k, addend=addend)
    # The way of an accelerator, on the CPU: plain torch operations, other blocks.
    with (
        mock.patch.object(sparsify, "CpuTopK", return_value=top_k),
        mock.patch.object(sparsify, "_CPU_BLOCK_ROWS", sparsify._DEVICE_BLOCK_ROWS),
    ):
        block = select(vector, bucket, k, addend=addend)
    assert_same(block, expected)


@pytest.mark.parametrize("block_rows", [1, 2, 3, 1000])
def test_result_does_not_depend_on_the_blocks(block_rows: int) -> None:
    bucket = layout((5, 4096), (3,), (3, 1500), (4, 4096), (2, 4096))
    t = torch.randn(bucket.numel)
    with mock.patch.object(sparsify, "_CPU_BLOCK_ROWS", block_rows):
        assert_same(select(t, bucket, 41), reference(t, bucket, 41))


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    bucket = layout((5, 4096), (3,), (3, 1500))
    vector, addend = torch.randn(bucket.numel), torch.randn(bucket.numel)
    for k in (1, 41, 4096):
        block = select(vector.cuda(), bucket, k, addend=addend.cuda())
        assert block.values.is_cuda
        on_cpu = SparseBlock(bucket, k, block.indices.cpu(), block.values.cpu(), block.dense.cpu())
        assert_same(on_cpu, select(vector, bucket, k, addend=addend))


# --- memory ---------------------------------------------------------------------------------------


def test_sum_never_exists_at_full_size() -> None:
    bucket = layout((1000, 4096))
    vector, addend = torch.randn(bucket.numel), torch.randn(bucket.numel)
    largest = 0
    load = sparsify._Source.load

    def watched(self: sparsify._Source, start: int, out: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, out.numel())
        load(self, start, out)

    tracemalloc.start()
    with mock.patch.object(sparsify._Source, "load", watched):
        select(vector, bucket, 41, addend=addend)
    _, numpy_peak = tracemalloc.get_traced_memory()  # numpy reports its arrays, torch does not
    tracemalloc.stop()
    block_numel = sparsify._CPU_BLOCK_ROWS * CHUNK_NUMEL
    assert largest <= block_numel
    # Keys are int32, one block; beside them at most the candidates of a block and their copies,
    # fewer than a quarter of its elements each at this k, and one block of rows to settle.
    assert numpy_peak < 3 * 4 * block_numel < 4 * bucket.numel // 5


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vector", "addend", "message"),
    [
        (torch.zeros(10), None, r"vector must be contiguous with shape \(4096,\), got \(10,\)"),
        (torch.zeros(8192)[::2], None, "vector must be contiguous"),
        (torch.zeros(4096).double(), None, "vector must be float32, bfloat16 or float16, got"),
        (torch.zeros(4096), torch.zeros(4095), r"addend must be float32 with shape \(4096,\)"),
        (torch.zeros(4096), torch.zeros(4096).half(), "addend must be float32 with shape"),
        (torch.zeros(4096), torch.zeros(4096, device="meta"), "addend must be on cpu, got meta"),
    ],
)
def test_wrong_tensors_are_refused(
    vector: torch.Tensor, addend: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        select(vector, BucketLayout((Segment(0, 4096, True),), 4096), 5, addend=addend)
