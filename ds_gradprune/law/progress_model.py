"""How many more steps than dense training takes with a density, and so which density learns most.

Without a budget of the user's, the law looks for the density that learns most per second: the one
with the least steps_factor(k, t) * step time(k), where

    steps_factor = 1 + c / sqrt(density) + d / (density * t / H)^1.5 + h(H)

The second term lasts for good: elements are late, and values are rounded. The third is the
beginning: an element waits about 1 / density exchanges for its turn, H steps each, which is long
while the run itself has lasted only t steps. (Deep Gradient Compression, arXiv:1712.01887, section
3.3, lowers its density over the first epochs for the same reason, by a fixed schedule.) The last is
what islands lose that hear of each other every H steps; it counts where the law chooses H.

c and d = 0.22 are fitted to measured curves of validation loss, as steps over dense's steps to the
same loss: 0.16M parameters, 4 workers, 800 to 3,000 steps, densities 0.1 to 10 %
(results/convergence_runs.jsonl), and 10.1M parameters, 2 hosts, 75 steps, densities 0.4 to 20 %
(results/ethernet_cpu_202611_2hosts.json). They are rough: for gradients c is 0.05 to 0.08 in the
first and 0.1 to 0.19 in the second. They need not be better: the least of a product of such a
factor and a straight line is flat, half or twice the best density costs few percent.
"""

from __future__ import annotations

import math

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.law.prices import Prices, ladder

LASTING = {"gradient": 0.1, "update": 0.012}
"""c by what is pruned: an optimizer suffers from late gradients more than weights from late
updates."""

STEPS_PER_GAP = 0.1
"""So much longer than dense's is a run that makes up for 1 % more loss: islands at 1 % need 1.05 to
1.15 times dense's steps, and lose 1.25 % (LOG.md, 2026-11-24)."""

_GAPS = {1: 1.92, 2: 1.65, 4: 0.72, 8: 0.89, 16: 1.54, 32: 4.11}
"""Loss beyond dense's in %, by interval, at 3.1 % and 2 bits with the residual reset: two islands,
0.16M, three seeds, standard errors 0.1 to 0.2 (results/convergence_cpu_202611_interval.md). Four is
the mean of 4 and 5 steps, and eight lies between 5 and 10."""

INTERVALS_COST = {i: STEPS_PER_GAP * (gap - min(_GAPS.values())) for i, gap in _GAPS.items()}
"""h by interval: what it costs beyond the best one."""

_BEGINNING = 0.22
"""d."""

_AGE_BITS = 2


def steps_factor(prune: str, k: int, step: int, interval: int | None = None) -> float:
    """Steps to a loss with k kept elements per chunk, over dense's steps to the same loss.

    Args:
        prune: "gradient" or "update".
        k: kept elements per chunk, 1 .. CHUNK_NUMEL; CHUNK_NUMEL is dense.
        step: how long the run has lasted, steps, >= 1.
        interval: H, where the law chooses it, one of `config.INTERVALS`; None: it is given.

    Returns:
        At least 1.0; 1.0 for dense.
    """
    if k == CHUNK_NUMEL:
        return 1.0
    density = k / CHUNK_NUMEL
    once, age = _of_interval(step, interval)
    beginning = _BEGINNING / _to_three_halves(density * age)
    return once + LASTING[prune] / math.sqrt(density) + beginning


def _of_interval(step: int, interval: int | None) -> tuple[float, float]:
    """What does not depend on the density, and how many exchanges the run has lasted."""
    if interval is None:
        return 1.0, float(_age(step))
    return 1.0 + INTERVALS_COST[interval], _age(step) / interval


def best_k(
    prices: Prices,
    prune: str,
    step: int,
    k_min: int,
    k_max: int,
    *,
    dense_share: float,
    interval: int | None = None,
) -> int:
    """The density that learns most per second at these prices.

    Args:
        prices: what a step costs.
        prune: "gradient" or "update".
        step: how long the run has lasted, steps, >= 1.
        k_min: least kept elements per chunk.
        k_max: most of them; dense may be chosen beyond it.
        dense_share: dense is chosen if it takes less than this share of the best pruned time.
        interval: see `steps_factor`.

    Returns:
        On the ladder, k_min .. k_max, or CHUNK_NUMEL.
    """
    # Both factors are sums of powers of k with positive coefficients, or, where exchanges hide, the
    # larger of two such sums; and so is their product: it is convex in log k and has one minimum,
    # where its derivative changes sign.
    hidden, exposed = prices.lines()
    once, age = _of_interval(step, interval)
    lasting, beginning = LASTING[prune], _BEGINNING / _to_three_halves(age)
    low, high = k_min, k_max
    while low < high:
        middle = (low + high + 1) // 2
        fixed_s, per_k_s = hidden if prices.hides(middle) else exposed
        density = middle / CHUNK_NUMEL
        if per_k_s == 0.0:
            low = middle
            continue
        ratio = fixed_s / (per_k_s * CHUNK_NUMEL)
        root = math.sqrt(density)
        slope = once * root * density * density + 0.5 * lasting * density * (density - ratio)
        slope -= beginning * (0.5 * density + 1.5 * ratio)
        low, high = (low, middle - 1) if slope > 0.0 else (middle, high)
    k = max(k_min, ladder(low))
    pruned_s = prices.step_s(k) * steps_factor(prune, k, step, interval)
    is_dense = k_min < k_max and prices.dense_bytes > 0.0  # min = max pins it
    return CHUNK_NUMEL if is_dense and prices.step_s(CHUNK_NUMEL) < dense_share * pruned_s else k


def _age(step: int) -> int:
    """The step's two leading bits: it moves the density in strides, not with every step."""
    return ladder(step, _AGE_BITS)


def _to_three_halves(x: float) -> float:
    return x * math.sqrt(x)  # `math.pow` belongs to the C library
