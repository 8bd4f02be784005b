"""The loss of a step, whoever scales it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_gradprune.deepspeed.losses import StepLosses, scalar_of


def loss(value: float) -> torch.Tensor:
    return torch.tensor(value, requires_grad=True)


def test_the_mean_over_the_micro_steps_that_were_made() -> None:
    """An epoch's last step of 2 of 4 micro-batches reported half its loss."""
    losses = StepLosses()
    for made in (4, 2, 1):
        for value in range(made):
            losses.backward(loss(2.0 + value), is_managed=True, is_scaled_by_us=True)
        losses.close_group()
        losses.end_step()
        assert losses.take() == pytest.approx(2.0 + (made - 1) / 2)


def test_a_caller_that_divides_is_summed() -> None:
    losses = StepLosses()
    for value in (0.5, 1.0, 1.5):
        losses.backward(loss(value), is_managed=True, is_scaled_by_us=False)
    losses.close_group()
    assert losses.so_far() == 3.0


def test_partial_losses_of_one_step_add_up() -> None:
    losses = StepLosses()
    for value in (0.7, 0.3):
        losses.backward(loss(value), is_managed=True, is_scaled_by_us=True)
        losses.close_group()
    assert losses.so_far() == pytest.approx(1.0)


@pytest.mark.parametrize("divide", [False, True])
def test_unmanaged_accumulation_asks_the_model_itself(divide: bool) -> None:
    losses = StepLosses()
    for value in (3.0, 5.0):
        losses.forward(loss(value))
        given = loss(value / 2 if divide else value)
        losses.backward(given, is_managed=False, is_scaled_by_us=True)
    assert losses.so_far() == 4.0


def test_unmanaged_accumulation_without_a_loss_of_the_model_takes_what_was_given() -> None:
    losses = StepLosses()
    losses.forward(torch.randn(3, 4))
    losses.backward(loss(3.0), is_managed=False, is_scaled_by_us=True)
    losses.backward(loss(5.0), is_managed=False, is_scaled_by_us=True)
    assert losses.so_far() == 4.0


def test_an_interval_is_the_mean_of_its_steps_and_goes_on_from_its_state() -> None:
    losses = StepLosses()
    losses.backward(loss(1.0), is_managed=True, is_scaled_by_us=True)
    losses.end_step()
    other = StepLosses()
    other.load_state_dict(losses.state_dict())
    other.backward(loss(3.0), is_managed=True, is_scaled_by_us=True)
    other.end_step()
    assert other.take() == 2.0
    assert other.take() is None


def test_an_unknown_step_is_unknown_and_a_sick_one_is_told() -> None:
    losses = StepLosses()
    losses.end_step()
    assert losses.take() is None
    losses.backward(loss(math.nan), is_managed=True, is_scaled_by_us=True)
    losses.end_step()
    taken = losses.take()
    assert taken is not None
    assert math.isnan(taken)


def test_where_a_model_keeps_its_loss() -> None:
    value = loss(2.0)
    for output in (value, {"loss": value}, (value, 1), [value], SimpleNamespace(loss=value)):
        assert scalar_of(output) is not None
    empties: list[Any] = [{}, (), None, torch.randn(3), torch.tensor(3), SimpleNamespace()]
    for empty in empties:
        assert scalar_of(empty) is None
