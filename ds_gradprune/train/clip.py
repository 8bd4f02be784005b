"""Robust aggregation: no sender counts for more than so many times the median norm of all.

A message whose norm is beyond `limit * median` is scaled down to it before it is added. What the
sender sent has left its residual all the same: what is cut off is lost on purpose. The median of an
even number is the lower one, so with two senders the smaller norm is the measure.

The factors must be equal to the bit on hosts with other processors, whose sums of floats may
differ. So squares are summed as integers, which have no order.

Clipping messages to the median of their norms is centred clipping (Karimireddy, He, Jaggi 2021,
arXiv 2012.10333) with zero as its centre and the median as its radius. All functions are local.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.train.load import Joined
from ds_gradprune.train.message import Arrived

_BITS = 16
"""Magnitudes are cut to so many bits below the largest one: an error of the norm below 1e-4."""


def energy(block: SparseBlock) -> float:
    """Sum of the squares of a block's values, equal on every processor."""
    parts = [part for part in (block.values, block.dense) if part.numel()]
    largest = max((float(part.abs().max()) for part in parts), default=0.0)
    if largest == 0.0:
        return 0.0
    _, exponent = math.frexp(largest)
    total = 0
    for part in parts:
        # A product with a power of two is exact in float64, and below 2 ** 16 here.
        whole = (part.double() * 2.0 ** (_BITS - exponent)).long()
        total += int((whole * whole).sum())
    return math.ldexp(float(total), 2 * (exponent - _BITS))


def factors(
    arrived: Arrived | Joined, num_buckets: int, limit: float, device: torch.device
) -> list[float]:
    """By how much each sender's message is scaled.

    Args:
        arrived: what all have sent, one delivery per sender and bucket.
        num_buckets: of the exchange.
        limit: in medians; > 0.
        device: where blocks are decoded.

    Returns:
        Numbers in (0, 1]; all 1 where the median is 0.
    """
    energies: list[float] = []
    for number in range(num_buckets):
        here = [energy(block) for block, _ in arrived.deliveries(number, device)]
        energies = [a + b for a, b in zip(energies, here, strict=True)] if energies else here
    return bounded([math.sqrt(square) for square in energies], limit)


def bounded(norms: Sequence[float], limit: float) -> list[float]:
    """What brings every norm down to `limit` times the lower median."""
    bound = limit * sorted(norms)[(len(norms) - 1) // 2] if norms else 0.0
    return [min(1.0, bound / norm) if bound and norm else 1.0 for norm in norms]
