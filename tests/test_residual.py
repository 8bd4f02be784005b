"""Error feedback: nothing is lost, nothing changes before the commit."""

from __future__ import annotations

import pytest
import torch

from ds_gradprune.errors import CheckpointError
from ds_gradprune.residual import Residual, ResidualStore


def test_commit_keeps_exactly_what_was_not_sent() -> None:
    residual = Residual(6)
    gradient = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0])
    residual.commit(gradient, torch.tensor([1, 5]), torch.tensor([-2.0, -6.0]))
    assert residual.buffer.tolist() == [1.0, 0.0, 3.0, -4.0, 5.0, 0.0]
    assert not residual.is_zero


def test_rounding_error_of_a_sent_value_stays() -> None:
    residual = Residual(2)
    gradient = torch.tensor([1.001, 0.5])
    sent = gradient[:1].bfloat16().float()
    residual.commit(gradient, torch.tensor([0]), sent)
    assert residual.buffer[0] == gradient[0] - sent[0] != 0.0


def test_residual_is_kept_in_unscaled_units() -> None:
    residual = Residual(3)
    residual.commit(torch.tensor([8.0, 16.0, 24.0]), torch.tensor([1]), torch.tensor([16.0]), 8.0)
    assert residual.buffer.tolist() == [1.0, 0.0, 3.0]
    gradient = torch.zeros(3)
    residual.add_to(gradient, scale=4.0)
    assert gradient.tolist() == [4.0, 0.0, 12.0]


def test_a_failed_exchange_keeps_the_whole_gradient() -> None:
    residual = Residual(2)
    residual.keep(torch.tensor([1.0, 2.0]))
    residual.keep(torch.tensor([0.5, 0.25]))
    assert residual.buffer.tolist() == [1.5, 2.25]


def test_clear_pays_off() -> None:
    residual = Residual(2)
    residual.keep(torch.ones(2))
    residual.clear()
    assert residual.is_zero
    assert residual.buffer.tolist() == [0.0, 0.0]


def test_low_precision_gradients_are_added_in_fp32() -> None:
    residual = Residual(1)
    for _ in range(256):
        residual.keep(torch.tensor([2.0**-8], dtype=torch.bfloat16))
    residual.keep(torch.tensor([256.0], dtype=torch.bfloat16))
    assert residual.buffer.item() == 257.0  # bf16 would have swallowed the 1


def test_store_allocates_once_per_bucket_and_counts_bytes() -> None:
    store = ResidualStore()
    first = store.of(0, torch.zeros(10))
    assert store.of(0, torch.zeros(10)) is first
    store.of(1, torch.zeros(5, dtype=torch.bfloat16))
    assert store.nbytes() == 4 * 15


def test_store_survives_its_state_dict() -> None:
    store = ResidualStore()
    store.of(0, torch.zeros(3)).keep(torch.tensor([1.0, 2.0, 3.0]))
    store.of(1, torch.zeros(2))
    other = ResidualStore()
    other.load_state_dict(store.state_dict())
    assert torch.equal(other.of(0, torch.zeros(3)).buffer, torch.tensor([1.0, 2.0, 3.0]))
    assert not other.of(0, torch.zeros(3)).is_zero
    assert other.of(1, torch.zeros(2)).is_zero
    store.of(0, torch.zeros(3)).clear()
    assert other.norm() == pytest.approx(14**0.5)  # a copy, not a view


def test_a_residual_of_another_model_is_refused() -> None:
    store = ResidualStore()
    store.of(0, torch.zeros(3))
    with pytest.raises(CheckpointError, match="bucket 0 has 4 elements, but its residual has 3"):
        store.of(0, torch.zeros(4))
