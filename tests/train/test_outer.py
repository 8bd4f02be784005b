"""Outer rules where the shared weights lie on another device than the own ones."""

from __future__ import annotations

import pytest
import torch

from ds_gradprune.bucket.block import empty_block
from ds_gradprune.train.outer import SlowMomentum
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
