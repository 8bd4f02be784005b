"""How many more steps than dense training takes with a density, and so which density learns most.

Without a budget of the user's, the law looks for the density that learns most per second: the one
with the least steps_factor(k, t) * step time(k), where

    steps_factor = 1 + c / sqrt(density) + d / (density * t)^1.5

The second term lasts for good: elements are late, and values are rounded. The third is the
beginning: an element waits about 1 / density steps for its turn, which is long while the run itself
has lasted only t steps. (Deep Gradient Compression, arXiv:1712.01887, section 3.3, lowers its
density over the first epochs for the same reason, by a fixed schedule.)

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

_BEGINNING = 0.22
"""d."""

_AGE_BITS = 2


def steps_factor(prune: str, k: int, step: int) -> float:
    """Steps to a loss with k kept elements per chunk, over dense's steps to the same loss.

    Args:
        prune: "gradient" or "update".
        k: kept elements per chunk, 1 .. CHUNK_NUMEL; CHUNK_NUMEL is dense.
        step: how long the run has lasted, steps, >= 1.

    Returns:
        At least 1.0; 1.0 for dense.
    """
    if k == CHUNK_NUMEL:
        return 1.0
    density = k / CHUNK_NUMEL
    beginning = _BEGINNING / _to_three_halves(density * _age(step))
    return 1.0 + LASTING[prune] / math.sqrt(density) + beginning


def best_k(
    prices: Prices, prune: str, step: int, k_min: int, k_max: int, *, dense_share: float
) -> int:
    """The density that learns most per second at these prices.

    Args:
        prices: what a step costs.
        prune: "gradient" or "update".
        step: how long the run has lasted, steps, >= 1.
        k_min: least kept elements per chunk.
        k_max: most of them; dense may be chosen beyond it.
        dense_share: dense is chosen if it takes less than this share of the best pruned time.

    Returns:
        On the ladder, k_min .. k_max, or CHUNK_NUMEL.
    """
    # Both factors are sums of powers of k with positive coefficients, and so is their product: it
    # is convex in log k and has one minimum, where its derivative changes sign.
    ratio = prices.step_s(0) / (prices.per_k_s * CHUNK_NUMEL)
    lasting, beginning = LASTING[prune], _BEGINNING / _to_three_halves(_age(step))
    low, high = k_min, k_max
    while low < high:
        middle = (low + high + 1) // 2
        density = middle / CHUNK_NUMEL
        root = math.sqrt(density)
        slope = root * density * density + 0.5 * lasting * density * (density - ratio)
        slope -= beginning * (0.5 * density + 1.5 * ratio)
        low, high = (low, middle - 1) if slope > 0.0 else (middle, high)
    k = max(k_min, ladder(low))
    pruned_s = prices.step_s(k) * steps_factor(prune, k, step)
    is_dense = k_min < k_max and prices.dense_bytes > 0.0  # min = max pins it
    return CHUNK_NUMEL if is_dense and prices.step_s(CHUNK_NUMEL) < dense_share * pruned_s else k


def _age(step: int) -> int:
    """The step's two leading bits: it moves the density in strides, not with every step."""
    return ladder(step, _AGE_BITS)


def _to_three_halves(x: float) -> float:
    return x * math.sqrt(x)  # `math.pow` belongs to the C library
