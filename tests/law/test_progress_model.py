"""How many more steps a density takes, and the density that learns most per second."""

import pytest

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.law.prices import Prices, ladder
from ds_gradprune.law.progress_model import best_k, steps_factor

K_MIN, K_MAX = 4, 1024


def make_prices(seconds_per_byte: float = 1e-6, **changed: float) -> Prices:
    base = {
        "compute_s": 0.2,
        "spread_s": 0.0,
        "codec_s": 0.02,
        "codec_per_k_s": 1e-5,
        "dense_codec_s": 0.0,
        "overhead_s": 0.005,
        "seconds_per_byte": seconds_per_byte,
        "noise": 0.05,
        "fixed_bytes": 5e3,
        "bytes_per_k": 850.0,
        "dense_bytes": 4e6,
        "dense_factor": 1.0,
    }
    return Prices(**(base | changed))


def chosen(prices: Prices, prune: str = "gradient", step: int = 300, share: float = 1.0) -> int:
    return best_k(prices, prune, step, K_MIN, K_MAX, dense_share=share)


@pytest.mark.parametrize("prune", ["gradient", "update"])
def test_dense_needs_dense_steps_and_pruning_more_of_them(prune: str) -> None:
    assert steps_factor(prune, CHUNK_NUMEL, 10) == 1.0
    ks = [1, 4, 40, 400, 4000, CHUNK_NUMEL]
    factors = [steps_factor(prune, k, 300) for k in ks]
    assert factors == sorted(factors, reverse=True)
    ages = [steps_factor(prune, 40, step) for step in (1, 10, 100, 1000, 10**9)]
    assert ages == sorted(ages, reverse=True)


def test_factor_is_that_of_the_measured_curves() -> None:
    # Late in runs of 800 to 1,500 steps with 4 workers, and of 60 steps at 10.1M parameters.
    assert 1.7 <= steps_factor("gradient", 41, 1000) <= 2.4
    assert 1.15 <= steps_factor("gradient", 410, 1000) <= 1.35
    assert steps_factor("update", 41, 1000) == pytest.approx(1.14, abs=0.05)
    assert steps_factor("update", 410, 1000) == pytest.approx(1.05, abs=0.03)


@pytest.mark.parametrize("prune", ["gradient", "update"])
@pytest.mark.parametrize("step", [1, 40, 300, 5000, 10**6])
@pytest.mark.parametrize("seconds_per_byte", [1e-9, 1e-8, 1e-7, 1e-6, 1e-5])
@pytest.mark.parametrize("codec_per_k_s", [0.0, 1e-4])
def test_best_is_the_best_of_all(
    prune: str, step: int, seconds_per_byte: float, codec_per_k_s: float
) -> None:
    prices = make_prices(seconds_per_byte, codec_per_k_s=codec_per_k_s)

    def loss_s(k: int) -> float:
        return prices.step_s(k) * steps_factor(prune, k, step)

    least_s = min(map(loss_s, {*map(ladder, range(K_MIN, K_MAX + 1)), CHUNK_NUMEL}))
    assert loss_s(chosen(prices, prune, step)) <= 1.005 * least_s  # whole k


def test_worse_link_and_longer_run_ask_for_less_and_gradients_for_more() -> None:
    by_rate = [chosen(make_prices(cost)) for cost in (1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)]
    assert by_rate == sorted(by_rate, reverse=True)
    assert by_rate[0] == CHUNK_NUMEL
    assert by_rate[-1] < 40
    by_age = [chosen(make_prices(), step=step) for step in (20, 100, 1000, 10**6)]
    assert by_age == sorted(by_age, reverse=True)
    assert len(set(by_age)) >= 3
    assert chosen(make_prices(), "update") < chosen(make_prices(), "gradient")


def test_pinned_density_and_unknown_dense_bytes_do_not_go_dense() -> None:
    cheap = make_prices(1e-9)
    assert best_k(cheap, "gradient", 300, 40, 40, dense_share=1.0) == 40
    assert chosen(make_prices(1e-9, dense_bytes=0.0)) == K_MAX


def test_dense_share_holds_the_side_that_one_is_on() -> None:
    level = next(
        prices
        for prices in (make_prices(1e-8 * 1.02**i) for i in range(400))
        if chosen(prices) != CHUNK_NUMEL
    )
    assert chosen(level, share=1.1) == CHUNK_NUMEL
    assert chosen(level, share=0.9) != CHUNK_NUMEL
