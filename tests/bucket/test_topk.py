"""The k largest magnitudes of every row: both ways equal a plain sort, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.bucket.topk_cpu import MAX_ROW_NUMEL, CpuTopK
from ds_gradprune.bucket.topk_torch import top_k
from tests.helpers.buckets import bits

ROWS = 6
Pick = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def sorted_top_k(t: torch.Tensor, k: int) -> torch.Tensor:
    """The definition: order by magnitude, ties by lowest index, then put indices in order."""
    magnitude = bits(t) & 0x7FFFFFFF
    order = torch.sort(magnitude, dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=1).values


def picked(pick: Pick, t: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    indices = torch.empty((len(t), k), dtype=torch.int16, device=t.device)
    values = torch.empty((len(t), k), device=t.device)
    pick(t, indices, values)
    return indices.long(), values


def near_one(spread: int) -> torch.Tensor:
    """Random numbers whose bits differ from those of 1.0 by less than `spread`."""
    return (bits(torch.ones(ROWS, 4096)) + torch.randint(spread, (ROWS, 4096)).int()).view(
        torch.float32
    )


def burst() -> torch.Tensor:
    """Few non-zero elements, as in the gradient of an embedding."""
    t = torch.zeros(ROWS, 4096)
    t[:, 1000:1100] = torch.randn(ROWS, 100)
    return t


DATA = {
    "normal": lambda: torch.randn(ROWS, 4096),
    "zeros": lambda: torch.zeros(ROWS, 4096),
    "signed zeros": lambda: torch.zeros(ROWS, 4096) * torch.randn(ROWS, 4096).sign(),
    "constant": lambda: torch.full((ROWS, 4096), -2.5),
    "few distinct": lambda: torch.randint(-3, 4, (ROWS, 4096)).float(),
    "bf16 values": lambda: torch.randn(ROWS, 4096).bfloat16().float(),
    "burst": burst,
    "equal upper bits": lambda: near_one(2),
    "two groups of upper bits": lambda: near_one(8192),
    "three groups of upper bits": lambda: near_one(12288),
    "denormal": lambda: torch.randint(-9000, 9000, (ROWS, 4096)).int().view(torch.float32),
    "any bits": lambda: torch.randint(-(2**31), 2**31, (ROWS, 4096)).int().view(torch.float32),
    "short rows": lambda: torch.randn(ROWS, 33),
    "rows of two": lambda: torch.randn(ROWS, 2).round(),
}


def test_rows_hold_a_chunk() -> None:
    assert CHUNK_NUMEL <= MAX_ROW_NUMEL


@pytest.mark.parametrize("k", [1, 2, 31, 41, 205, 1024, 4032, 4063, 4064, 4065, 4095])
@pytest.mark.parametrize("kind", DATA)
def test_both_ways_equal_a_sort(kind: str, k: int) -> None:
    t = DATA[kind]()
    k = min(k, t.shape[1] - 1)
    before = bits(t).clone()
    expected = sorted_top_k(t, k)
    for pick in (CpuTopK(t.numel()), top_k):
        indices, values = picked(pick, t, k)
        assert torch.equal(indices, expected)
        assert torch.equal(bits(values), bits(t.gather(1, expected)))
    assert torch.equal(bits(t), before)


@given(
    numbers=st.lists(
        st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0]), min_size=2, max_size=90
    ),
    share=st.floats(0.0, 1.0),
)
def test_any_row_equals_a_sort(numbers: list[float], share: float) -> None:
    t = torch.tensor([numbers], dtype=torch.float32)
    k = 1 + int(share * (len(numbers) - 2))
    expected = sorted_top_k(t, k)
    for pick in (CpuTopK(t.numel()), top_k):
        assert torch.equal(picked(pick, t, k)[0], expected)


def test_many_equal_elements_do_not_push_out_a_larger_one() -> None:
    t = torch.zeros(1, 4096)
    t[0, :500] = (bits(torch.ones(1)) | 0xFFF).view(torch.float32)  # all lower bits set
    t[0, 2000] = 2.0
    for pick in (CpuTopK(t.numel()), top_k):
        assert picked(pick, t, 3)[0].tolist() == [[0, 1, 2000]]


def test_scratch_is_reused_for_smaller_matrices() -> None:
    pick = CpuTopK(4 * 4096)
    large, small = torch.randn(4, 4096), torch.randn(3, 50)
    for t, k in ((large, 100), (small, 7), (large, 100)):
        assert torch.equal(picked(pick, t, k)[0], sorted_top_k(t, k))


def test_nan_and_infinity_are_picked_first() -> None:
    t = torch.randn(1, 4096)
    t[0, 17], t[0, 3000], t[0, 4095] = float("nan"), float("inf"), float("-inf")
    for pick in (CpuTopK(t.numel()), top_k):
        assert picked(pick, t, 3)[0].tolist() == [[17, 3000, 4095]]


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    t = torch.cat([DATA[kind]() for kind in DATA if DATA[kind]().shape[1] == 4096])
    for k in (1, 41, 205, 4095):
        expected = picked(CpuTopK(t.numel()), t, k)
        indices, values = picked(top_k, t.cuda(), k)
        assert torch.equal(indices.cpu(), expected[0])
        assert torch.equal(bits(values.cpu()), bits(expected[1]))
