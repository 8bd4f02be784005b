"""What an exchange costs when it travels behind the computation."""

from __future__ import annotations

import pytest

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.law.prices import Prices, ladder
from ds_gradprune.law.progress_model import best_k, steps_factor
from tests.helpers.simulated_law import BUDGET_S, CODEC_S, COMPUTE_S, MBIT, Run, comm_s

PRICES = Prices(
    compute_s=1.0,
    spread_s=0.0,
    codec_s=0.01,
    codec_per_k_s=0.0,
    dense_codec_s=0.0,
    overhead_s=0.001,
    seconds_per_byte=1e-6,
    noise=0.05,
    fixed_bytes=1000.0,
    bytes_per_k=2000.0,
    dense_bytes=8e6,
    dense_factor=1.0,
)
HIDDEN = PRICES._replace(hide_s=0.5)


def test_only_what_does_not_hide_lengthens_a_step() -> None:
    assert HIDDEN.step_s(100) == pytest.approx(1.01)  # 0.202 s on the wire
    assert HIDDEN.step_s(400) == pytest.approx(1.01 + 0.802 - 0.5)
    assert HIDDEN.step_s(CHUNK_NUMEL) == PRICES.step_s(CHUNK_NUMEL)  # dense ones are waited for


def test_a_budget_affords_what_hides() -> None:
    exposed = PRICES.affordable_k(1.1, 1, CHUNK_NUMEL)
    hidden = HIDDEN.affordable_k(1.1, 1, CHUNK_NUMEL)
    assert hidden > 5 * exposed
    assert HIDDEN.fits(hidden, 1.1)
    assert not HIDDEN.fits(2 * hidden, 1.1)


@pytest.mark.parametrize("hidden_cost", [0.0, 0.1])
@pytest.mark.parametrize("codec_per_k_s", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("hide_s", [0.0, 0.05, 0.5, 5.0])
@pytest.mark.parametrize("budget_s", [1.005, 1.02, 1.1, 1.6])
def test_what_is_affordable_is_the_highest_that_fits(
    hidden_cost: float, codec_per_k_s: float, hide_s: float, budget_s: float
) -> None:
    prices = PRICES._replace(hidden_cost=hidden_cost, codec_per_k_s=codec_per_k_s, hide_s=hide_s)
    found = prices.affordable_k(budget_s, 1, CHUNK_NUMEL - 1)
    fitting = [k for k in range(1, CHUNK_NUMEL) if prices.fits(k, budget_s)]
    highest = max(fitting, default=1)
    # On the ladder, and from whole numbers. Where all hides, the noise of the exchange does not
    # count, so a little more fits than the formula for what is exposed says.
    assert 0.85 * highest - 1 <= found <= highest


@pytest.mark.parametrize("hidden_cost", [0.0, 0.1])
@pytest.mark.parametrize("seconds_per_byte", [1e-8, 1e-7, 1e-6])
@pytest.mark.parametrize("step", [40, 300, 5000])
def test_best_of_what_hides_is_the_best_of_all(
    hidden_cost: float, seconds_per_byte: float, step: int
) -> None:
    prices = HIDDEN._replace(
        hidden_cost=hidden_cost, seconds_per_byte=seconds_per_byte, codec_per_k_s=1e-6
    )

    def loss_s(k: int) -> float:
        return prices.step_s(k) * steps_factor("update", k, step)

    best = best_k(prices, "update", step, 4, 1024, dense_share=0.0)
    assert loss_s(best) <= 1.005 * min(map(loss_s, map(ladder, range(4, 1025))))


def test_a_cost_of_what_hides_asks_for_less() -> None:
    free, paid = (HIDDEN._replace(hidden_cost=c, seconds_per_byte=1e-7) for c in (0.0, 0.1))
    found = [best_k(p, "update", 10**6, 4, 1024, dense_share=0.0) for p in (free, paid)]
    assert found[0] == 1024
    assert found[1] < 750


RATE = 4 * MBIT
ROOM_S = BUDGET_S - COMPUTE_S - CODEC_S


@pytest.mark.parametrize("hides_s", [0.0, 0.02, 0.12])
def test_gradients_that_leave_early_pay_for_what_is_waited_for(hides_s: float) -> None:
    run = Run(hides_s=hides_s, noise=0.03).steps(300, RATE)
    exposed_s = comm_s(run.k, RATE) - hides_s
    # Two standard deviations are left, and the dead band is a quarter of the density.
    assert 0.65 * ROOM_S <= exposed_s <= ROOM_S
    assert len({d.density for d in run.decisions[-150:]}) == 1


def test_what_hides_as_a_whole_is_free_for_gradients() -> None:
    plain, early = (Run(hides_s=s, noise=0.03).steps(300, 40 * MBIT) for s in (0.0, 1.0))
    assert early.k > 1.3 * plain.k
    assert early.k == 1024  # density.max
