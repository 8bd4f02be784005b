"""How far the shared weights move when the islands' updates are averaged.

Adam's update has about the same length on every island, whatever the gradient's. Where the
islands' updates agree, their mean is as long as each of them; where they are noise, it is shorter
by the square root of their number. Dense training does not lose that: averaging gradients shrinks
Adam's second moment along with the noise. So the mean of the updates is multiplied by a factor
between 1 and the square root of the number of islands.

Pure: numbers in, a number out.
"""

from __future__ import annotations

import math

SLOW_STEPS = 100
"""Optimizer steps that the slow momentum averages over."""


def update_scale(islands: int, setting: float | None) -> float:
    """The factor on the mean of the islands' updates.

    Args:
        islands: how many there are, >= 1.
        setting: the user's factor; None: the square root of `islands`, right where the updates are
            mostly noise, which holds for small local batches.

    Returns:
        The factor, > 0.
    """
    return math.sqrt(islands) if setting is None else setting


def slow_decay(sync_every: int) -> float:
    """Decay of the slow momentum from one exchange to the next: memory of SLOW_STEPS steps."""
    return (1.0 - 1.0 / SLOW_STEPS) ** sync_every
