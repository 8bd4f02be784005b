"""The slow momentum of the shared weights."""

from __future__ import annotations

import pytest
import torch

from ds_gradprune.momentum import SlowMomentum
from ds_gradprune.step_rule import SLOW_STEPS, slow_decay

NUMEL = 50


def momentum(strength: float = 2.0, decay: float = 0.5) -> SlowMomentum:
    return SlowMomentum([torch.empty(7), torch.empty(NUMEL)], strength, decay)


def test_what_lasts_moves_one_plus_strength_times_as_far() -> None:
    slow, move = momentum(), torch.full((NUMEL,), 0.25)
    first = slow.follow_all(1, move)
    assert torch.equal(first, torch.full((NUMEL,), 0.25))  # 2 * (1 - 0.5) * 0.25
    for _ in range(40):
        drift = slow.follow_all(1, move)
    torch.testing.assert_close(drift, 2.0 * move)


def test_what_turns_about_hardly_moves_further() -> None:
    slow, move = momentum(strength=1.0, decay=0.99), torch.full((NUMEL,), 0.25)
    for step in range(400):
        drift = slow.follow_all(1, move if step % 2 else -move)
    assert float(drift.abs().max()) < 0.01 * 0.25


def test_parts_are_what_their_sum_is() -> None:
    one, other = momentum(), momentum()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        parts = [
            (torch.randperm(NUMEL, generator=generator)[:9], torch.randn(9, generator=generator))
            for _ in range(3)
        ]
        move = torch.zeros(NUMEL)
        for positions, values in parts:
            move.index_add_(0, positions, values.mul(0.75))
        torch.testing.assert_close(one.follow(1, parts, 0.75), other.follow_all(1, move))


def test_buckets_are_apart() -> None:
    slow, move = momentum(), torch.ones(NUMEL)
    slow.follow_all(1, move)
    assert move.eq(1.0).all()
    assert not slow.state_dict()[0].any()
    assert slow.state_dict()[1].eq(1.0).all()
    assert slow.nbytes == 4 * (7 + NUMEL)


def test_it_goes_on_where_it_stood() -> None:
    slow, again = momentum(), momentum()
    slow.follow_all(1, torch.ones(NUMEL))
    again.load_state_dict(slow.state_dict())
    move = torch.arange(NUMEL) / 7.0
    assert torch.equal(again.follow_all(1, move), slow.follow_all(1, move))
    again.reset()
    assert not again.follow_all(1, torch.zeros(NUMEL)).any()
    with pytest.raises(ValueError, match=r"\(50,\) is not \(7,\)"):
        slow.load_state_dict(slow.state_dict()[::-1])
    with pytest.raises(ValueError, match="shorter"):
        slow.load_state_dict(slow.state_dict()[:1])


def test_its_memory_is_counted_in_steps_not_in_exchanges() -> None:
    assert slow_decay(16) == pytest.approx(slow_decay(1) ** 16)
    assert sum(slow_decay(1) ** age for age in range(5000)) == pytest.approx(SLOW_STEPS)
