"""Where each of DeepSpeed's optimizers keeps its fp32 weights."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from ds_gradprune.errors import UnsupportedError

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.filterwarnings("default")

from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer  # noqa: E402

from ds_gradprune.integration.masters import Masters  # noqa: E402


def model(dtype: torch.dtype) -> torch.nn.Sequential:
    """A matrix, a bias, and a matrix that is frozen."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2, bias=False))
    module[1].weight.requires_grad_(False)
    return module.to(dtype)


def engine(optimizer: Any) -> Any:
    return types.SimpleNamespace(optimizer=optimizer)


def fused(module: torch.nn.Sequential) -> FP16_Optimizer:
    """What DeepSpeed makes of bf16 and FusedAdam, around an optimizer that needs no compiler."""
    weight, bias = module[0].weight, module[0].bias
    inner = torch.optim.AdamW([{"params": [weight]}, {"params": [bias]}], lr=0.1)
    return FP16_Optimizer(inner, low_precision_dtype=torch.bfloat16, static_loss_scale=1.0)


def test_fp32_weights_are_the_models_own() -> None:
    module = model(torch.float32)
    masters = Masters(engine(torch.optim.SGD(module.parameters(), lr=0.1)))
    assert [t.data_ptr() for t in masters.tensors()] == [
        module[0].weight.data_ptr(),
        module[0].bias.data_ptr(),
    ]
    before = module[0].weight.clone()
    masters.publish()
    assert torch.equal(module[0].weight, before)


def test_flat_groups_are_cut_into_the_parameters() -> None:
    module = model(torch.bfloat16)
    masters = Masters(engine(fused(module)))
    tensors = masters.tensors()
    assert [(t.shape, t.dtype) for t in tensors] == [
        (torch.Size((5, 3)), torch.float32),
        (torch.Size((5,)), torch.float32),
    ]
    with torch.no_grad():
        for number, tensor in enumerate(masters.tensors()):
            tensor.fill_(1.0 + number + 2.0**-12)
    masters.publish()
    assert module[0].weight.eq(1.0).all()  # rounded to bf16
    assert module[0].bias.eq(2.0).all()
    assert masters.tensors()[1][0] == 2.0 + 2.0**-12


def test_state_without_the_weights_goes_round() -> None:
    one, other = fused(model(torch.bfloat16)), fused(model(torch.bfloat16))
    for flat in one.fp32_groups_flat:
        flat.grad = torch.ones_like(flat)
    one.optimizer.step()
    state = Masters(engine(one)).state_dict()
    assert "fp32_groups_flat" not in state
    before = [flat.detach().clone() for flat in other.fp32_groups_flat]
    Masters(engine(other)).load_state_dict(state)
    for flat, kept in zip(other.fp32_groups_flat, before, strict=True):
        assert torch.equal(flat, kept)
    moments = [
        [optimizer.optimizer.state[flat]["exp_avg"] for flat in optimizer.fp32_groups_flat]
        for optimizer in (one, other)
    ]
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*moments, strict=True))


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(
        UnsupportedError, match="does not know where SimpleNamespace keeps its fp32"
    ):
        Masters(engine(types.SimpleNamespace()))


def test_weights_that_are_not_fp32_are_refused() -> None:
    optimizer = torch.optim.SGD(model(torch.bfloat16).parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match=r"got torch\.bfloat16\. Set bf16\.enabled"):
        Masters(engine(optimizer))
