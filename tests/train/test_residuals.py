"""Residuals belong to parameters, and change only when a step was applied."""

from __future__ import annotations

import pytest
import torch

from ds_gradprune.errors import CheckpointError
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.residual import Residuals

CPU = torch.device("cpu")


def staged(residuals: Residuals, keys: str, *values: float) -> None:
    flat = torch.tensor([float(v) for v in values for _ in range(2)])
    residuals.stage(list(keys), [2] * len(keys), flat)


def of(residuals: Residuals, keys: str) -> list[float] | None:
    flat = residuals.of(list(keys), [2] * len(keys), CPU)
    return None if flat is None else flat[::2].tolist()


def test_a_residual_kept_aside_has_a_norm() -> None:
    kept = KeptResidual(0.5)
    assert kept.norm() == 0.0
    kept.take([torch.tensor([3.0, 0.0]), torch.tensor([-4.0])])
    assert kept.norm() == 5.0


def test_a_dropped_step_changes_nothing() -> None:
    residuals = Residuals()
    staged(residuals, "ab", 1, 2)
    residuals.commit()
    staged(residuals, "ab", 5, 6)
    assert of(residuals, "ab") == [5, 6]  # a second reduction of the same step
    residuals.drop()
    assert of(residuals, "ab") == [1, 2]


def test_a_dense_step_that_is_skipped_clears_nothing() -> None:
    residuals = Residuals()
    staged(residuals, "ab", 1, 2)
    residuals.commit()
    residuals.stage(["a", "b"], [2, 2], None)
    residuals.drop()
    assert of(residuals, "ab") == [1, 2]
    residuals.stage(["a", "b"], [2, 2], None)
    residuals.commit()
    assert of(residuals, "ab") is None


def test_a_frozen_parameter_keeps_its_residual_and_a_new_one_has_none() -> None:
    residuals = Residuals()
    staged(residuals, "abc", 1, 2, 3)
    residuals.commit()
    assert of(residuals, "bd") == [2, 0]
    staged(residuals, "bd", 7, 8)
    residuals.commit()
    assert of(residuals, "cba") == [3, 7, 1]
    assert of(residuals, "d") == [8]


def test_state_is_by_parameter() -> None:
    residuals = Residuals()
    staged(residuals, "ab", 3, 4)
    residuals.commit()
    other = Residuals()
    other.take(other.read({k: v.clone() for k, v in residuals.state_dict().items()}))
    assert of(other, "ba") == [4, 3]
    assert other.nbytes == 16
    assert other.norm() == pytest.approx(50**0.5)


def test_a_residual_of_another_size_is_refused() -> None:
    residuals = Residuals()
    residuals.take({"a": torch.ones(3)})
    with pytest.raises(CheckpointError, match="a has 2 elements, but its residual has 3"):
        residuals.of(["a"], [2], CPU)
    with pytest.raises(CheckpointError, match="1-D tensors"):
        residuals.read({"a": 3})


def test_what_a_step_has_staged_is_found_in_other_company() -> None:
    residuals = Residuals()
    staged(residuals, "abc", 1, 2, 3)
    residuals.commit()
    staged(residuals, "ab", 10, 20)  # the first reduction of a step; c keeps what it is owed
    assert of(residuals, "bc") == [20, 3]
    staged(residuals, "bc", 21, 31)
    residuals.stage(["a"], [2], None)
    assert of(residuals, "cab") == [31, 0, 21]
    residuals.drop()
    assert of(residuals, "abc") == [1, 2, 3]
    staged(residuals, "ab", 10, 20)
    staged(residuals, "bc", 21, 31)
    residuals.commit()
    assert of(residuals, "abc") == [10, 21, 31]
    assert residuals.nbytes == 24
