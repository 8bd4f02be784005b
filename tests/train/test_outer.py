"""Outer rules where the shared weights lie on another device than the own ones."""

from __future__ import annotations

import pytest
import torch

from ds_gradprune.bucket.block import empty_block
from ds_gradprune.train.outer import SlowMomentum, update_scale
from ds_gradprune.train.scale import scale_at, sparse_scale
from tests.helpers.buckets import layout_by_shape

LAYOUT = layout_by_shape((2, 4096), (7,))
NUMEL = LAYOUT.numel


def test_deliveries_may_lie_on_another_device_than_the_shared_weights() -> None:
    rule = SlowMomentum(1.0, 0.5)
    rule.begin(0, torch.zeros(NUMEL), 0, NUMEL)
    rule.note(empty_block(LAYOUT, 5, "meta"), 0.5)
    with pytest.raises(NotImplementedError, match="no data"):  # meta's: real ones can be copied
        rule.drift()


def test_averages_move_to_the_weights_that_a_checkpoint_was_loaded_for() -> None:
    rule = SlowMomentum(1.0, 0.5)
    rule.take([torch.zeros(NUMEL)])
    rule.begin(0, torch.zeros(NUMEL, device="meta"), 0, NUMEL)
    drift = rule.drift()
    assert drift is not None
    assert drift.device.type == "meta"


def test_an_average_that_was_moved_is_remembered() -> None:
    rule, store = SlowMomentum(1.0, 0.5), torch.zeros(NUMEL)
    for expected in (0.5, 0.75):
        rule.begin(0, store, 0, NUMEL)
        rule._current = rule._current.clone()  # as a copy on another device
        rule.note_dense(torch.ones(NUMEL))
        drift = rule.drift()
        assert drift is not None
        assert drift.unique().tolist() == [expected]


@pytest.mark.parametrize(
    ("islands", "density", "scale"),
    [
        (2, 0.001, 2.0),
        (2, 1 / 32, 2.0),
        (2, 5 / 64, 1 + 0.5**0.5),
        (2, 1 / 8, 2**0.5),
        (2, 1 / 4, 2**0.5),
        (2, 5 / 8, (1 + 2**0.5) / 2),
        (2, 1.0, 1.0),
        (4, 1.0, 1.0),
        (1, 1 / 32, 1.0),
        (3, 1 / 32, 2.0),
        (4, 1 / 32, 2.0),
        (9, 1 / 32, 3.0),
    ],
)
def test_the_scale_falls_with_the_density(islands: int, density: float, scale: float) -> None:
    sparse = sparse_scale(None, "reset")
    found = scale_at(density, update_scale(islands, None), sparse, islands)
    assert found == pytest.approx(scale, rel=1e-12)


def test_a_users_scale_and_a_used_residual_hold_at_every_density() -> None:
    assert sparse_scale(1.5, "reset") is None
    assert sparse_scale(None, "used") is None
    assert scale_at(1 / 32, 1.5, None, 2) == 1.5
