"""The shared weights: what moves, what stays, and how exactly."""

from __future__ import annotations

import pytest
import torch

from ds_gradprune.records import Part
from ds_gradprune.shared import SharedWeights

SHAPES = [(5, 7), (3,), (11, 2)]
NUMEL = 35 + 3 + 22


def tensors(seed: int, grid: float | None = None) -> list[torch.Tensor]:
    """Weights; with a grid, small whole multiples of it, so that sums in fp32 are exact."""
    generator = torch.Generator().manual_seed(seed)
    if grid is None:
        return [torch.randn(shape, generator=generator) for shape in SHAPES]
    whole = [torch.randint(-4096, 4096, shape, generator=generator) for shape in SHAPES]
    return [tensor.float() * grid for tensor in whole]


def flat(own: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in own])


def part(positions: list[int], values: torch.Tensor) -> Part:
    at = torch.tensor(positions)
    return at, values[at]


def stepped(seed: int, grid: float | None = None) -> tuple[SharedWeights, list[torch.Tensor]]:
    """Shared weights, and own ones that have gone on by a step."""
    own = tensors(seed, grid)
    weights = SharedWeights(lambda: own)
    for tensor, update in zip(own, tensors(seed + 1, grid), strict=True):
        tensor.add_(update, alpha=2.0**-3)
    return weights, own


def test_a_bucket_is_closed_when_it_is_full() -> None:
    own = tensors(0)
    weights = SharedWeights(lambda: own, bucket_numel=36)
    assert [len(shapes) for shapes in weights.shapes] == [2, 1]
    assert torch.equal(torch.cat([weights.own(0), weights.own(1)]), flat(own))
    assert weights.nbytes == 4 * NUMEL


def test_what_is_sent_leaves_the_residual_and_enters_the_shared_weights() -> None:
    """On a grid of 2^-15 every sum is exact, so conservation holds to the last bit."""
    grid, factor = 2.0**-12, 0.75
    weights, own = stepped(1, grid)
    other, _ = stepped(5, grid)
    shared, residual = weights.shared(0).clone(), flat(own) - weights.shared(0)
    theirs = other.own(0) - other.shared(0)
    parts = [part([3, 20, 37], theirs), part([0, 20, 36, 59], residual)]
    weights.move(0, weights.own(0), parts, rank=1, factor=factor)
    sent = [torch.zeros(NUMEL).index_add_(0, *p) for p in parts]
    assert torch.equal(weights.shared(0), shared + factor * (sent[0] + sent[1]))
    assert torch.equal(flat(own) - weights.shared(0), residual - sent[1])


def test_rounding_is_that_of_fp32_weights_and_no_more() -> None:
    """own and shared are each rounded once per element that a part holds, both by half an ulp.

    A bf16 value leaves an exact rest, and own - shared is exact where both lie within a factor of
    2 of each other and otherwise rounded by half an ulp of something not larger than both.
    """
    weights, own = stepped(2)
    shared = weights.shared(0).double()
    residual = flat(own).double() - shared
    rounded = (weights.own(0) - weights.shared(0)).bfloat16().float()
    positions = list(range(0, NUMEL, 2))
    weights.move(0, weights.own(0), [part(positions, rounded)] * 2, rank=0, factor=0.5)
    sent = torch.zeros(NUMEL, dtype=torch.float64)
    sent[positions] = rounded[positions].double()
    after = weights.shared(0).double()
    ulp = 2.0**-23 * torch.maximum(
        flat(own).double().abs(), torch.maximum(after.abs(), shared.abs())
    )
    assert ((after - (shared + sent)).abs() <= 2 * ulp).all()
    assert ((flat(own).double() - after - (residual - sent)).abs() <= 2 * ulp).all()
    assert (sent != 0).sum() == len(positions)


def test_what_nobody_sent_keeps_its_bits() -> None:
    """Even where shared + (own - shared) would not give own back: 1e-12 beside 1."""
    own = [torch.tensor([1.0 + 2.0**-20, 3.0, -0.0, 5.0])]
    weights = SharedWeights(lambda: own)
    weights.shared(0).copy_(torch.tensor([1e-12, 1e30, 7.0, 5.0]))
    before, shared = own[0].clone(), weights.shared(0).clone()
    sent = (torch.tensor([3]), torch.tensor([0.5]))
    weights.move(0, weights.own(0), [sent, sent], rank=0, factor=0.5)
    assert torch.equal(own[0][:3].view(torch.int32), before[:3].view(torch.int32))
    assert torch.equal(weights.shared(0)[:3], shared[:3])
    assert weights.shared(0)[3] == 5.5
    assert own[0][3] == 5.0  # 0.5 of it was sent and came back


def test_what_cancels_still_leaves_the_residual() -> None:
    own = [torch.tensor([2.0, 8.0])]
    weights = SharedWeights(lambda: own)
    own[0][0] = 2.5
    plus, minus = ((torch.tensor([0]), torch.tensor([value])) for value in (0.5, -0.5))
    weights.move(0, weights.own(0), [plus, minus], rank=0, factor=0.5)
    assert weights.shared(0).tolist() == own[0].tolist() == [2.0, 8.0]


def test_a_dense_exchange_ends_every_difference() -> None:
    weights, own = stepped(3, 2.0**-12)
    shared = weights.shared(0).clone()
    total = 3 * (weights.own(0) - shared)
    weights.move_all(0, 0.5 * total)
    assert torch.equal(weights.shared(0), shared + 0.5 * total)
    assert torch.equal(flat(own), weights.shared(0))


def test_swap_shows_the_shared_weights_and_is_its_own_inverse() -> None:
    weights, own = stepped(4)
    mine, shared, crc = weights.own(0), weights.shared(0).clone(), weights.crc()
    weights.swap()
    assert torch.equal(flat(own), shared)
    weights.swap()
    assert torch.equal(flat(own), mine)
    assert weights.crc() == crc


def test_a_swap_between_forward_and_backward_is_found_by_autograd() -> None:
    own = [torch.nn.Parameter(torch.ones(2, 2))]
    weights = SharedWeights(lambda: own)
    loss = (own[0] * own[0]).sum()
    weights.swap()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_whose_memory_was_replaced_are_found() -> None:
    own = [torch.nn.Parameter(torch.zeros(4))]
    weights = SharedWeights(lambda: own)
    own[0].data = torch.ones(4)
    weights.capture()
    assert weights.shared(0).tolist() == [1.0] * 4


def test_own_weights_can_be_put_back() -> None:
    weights, own = stepped(6)
    saved = [weights.own(0)]
    for tensor in own:
        tensor.zero_()
    weights.set_own(saved)
    assert torch.equal(flat(own), saved[0])
    with pytest.raises(ValueError, match=r"\(59,\) is not \(60,\)"):
        weights.set_own([saved[0][1:]])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inf_and_nan_are_seen(value: float) -> None:
    weights, own = stepped(7)
    assert weights.is_finite()
    own[1][2] = value
    assert not weights.is_finite()
