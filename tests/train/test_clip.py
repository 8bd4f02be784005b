"""Robust aggregation: a sender that shouts is bounded by the median of all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ds_gradprune.bucket.layout import lay_out
from ds_gradprune.bucket.select import select
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.clip import bounded, energy
from ds_gradprune.train.gradients import Gradient, GradientPruning
from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.all_gather import AllGather
from tests.helpers.loopback_ranks import on_ranks

SIGNALS = RankSignals(1.0, False, 0.1, 0.0, 0.0, 0, 0)
NUMEL, RANKS, STEPS = 4096, 4, 200
WHOLE = (Gradient("weight", NUMEL, True),)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e12])
def test_the_energy_of_a_block_is_that_of_its_values_in_any_order(scale: float) -> None:
    torch.manual_seed(0)
    layout = lay_out((4096, 10), (True, False))
    block = select(torch.randn(layout.numel) * scale, layout, 100)
    exact = math.fsum(float(v) ** 2 for v in [*block.values, *block.dense])
    assert energy(block) == pytest.approx(exact, rel=2e-4)
    order = torch.randperm(block.values.numel())
    found = energy(block)
    block.values.copy_(block.values[order])
    assert energy(block) == found


def test_nothing_has_no_energy() -> None:
    layout = lay_out((50,), (True,))
    assert energy(select(torch.zeros(50), layout, 4096)) == 0.0


@pytest.mark.parametrize(
    ("norms", "limit", "expected"),
    [
        ([1.0, 4.0, 2.0], 1.0, [1.0, 0.5, 1.0]),
        ([1.0, 4.0, 2.0], 3.0, [1.0, 1.0, 1.0]),
        ([1.0, 4.0], 1.0, [1.0, 0.25]),  # of two the smaller one
        ([0.0, 0.0, 5.0], 1.0, [1.0, 1.0, 1.0]),  # nobody else has anything to say
        ([], 1.0, []),
    ],
)
def test_norms_are_brought_down_to_the_median(
    norms: list[float], limit: float, expected: list[float]
) -> None:
    assert bounded(norms, limit) == expected


def train(clip: float | None, loud: float) -> list[tuple[float, bool]]:
    """Four ranks descend towards ones over noisy gradients; rank 3's are `loud` times too large.

    Returns:
        On every rank the distance that is left, over that at the start, and whether all are equal.
    """

    def work(transport: Any) -> torch.Tensor:
        pruning = GradientPruning(
            AllGather(transport),
            Stopwatch(lambda: 0.0),
            value_bits=4,
            error_feedback=True,
            clip=clip,
        )
        noise = torch.Generator().manual_seed(transport.rank)
        weight = torch.zeros(NUMEL)
        for step in range(1, STEPS + 1):
            gradient = weight - 1.0 + 0.5 * torch.randn(NUMEL, generator=noise)
            if transport.rank == 3:
                gradient = loud * torch.randn(NUMEL, generator=noise)
            pruning.begin()
            pruning.reduce(gradient, WHOLE, 400, step=step, signals=SIGNALS)
            pruning.commit(applied=True)
            weight = weight - 0.05 * gradient / RANKS
        return weight

    weights = on_ranks(RANKS, work)
    left = [float((w - 1.0).norm()) / math.sqrt(NUMEL) for w in weights]
    return [(share, torch.equal(w, weights[0])) for share, w in zip(left, weights, strict=True)]


def test_a_rank_that_shouts_is_bounded_by_the_median() -> None:
    """Its gradients were a million times too large, and every weight followed them."""
    bounded_ranks = train(1.0, 1e6)
    assert all(is_equal for _, is_equal in bounded_ranks)
    kept, lost, quiet = bounded_ranks[0][0], train(None, 1e6)[0][0], train(None, 1.0)[0][0]
    assert lost > 1e4
    assert kept < 0.1
    assert abs(kept - quiet) < 0.1
