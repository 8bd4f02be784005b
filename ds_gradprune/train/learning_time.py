"""Learning-rate time: what an outer momentum counts in where the interval of exchanges changes.

A slow momentum averages the moves of the shared weights. With rounds of different lengths, and a
learning rate that falls, a round is no unit of time. What a round moves goes with the sum of its
learning rates. So that sum, over the highest rate so far, is the time of a round: with a constant
rate its number of steps (AutoLoCo, arXiv 2609.36662: changes of the interval lose without it).

All functions are local, and every island computes the same from the same schedule. The time is
rounded, so a schedule whose last bit differs between hosts does no harm, and it is compared in the
headers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_gradprune.train.outer import TIME_GRID, OuterRule, TimedMomentum


class LearningTime:
    """Sums learning rates over a round.

    Args:
        rule: is told how long a round has lasted.
    """

    def __init__(self, rule: TimedMomentum) -> None:
        self._rule = rule
        self._sum = self._highest = 0.0

    def end_step(self, rates: Sequence[float]) -> None:
        """The optimizer has stepped with these rates, one per group of parameters."""
        rate = max((float(rate) for rate in rates), default=0.0)
        self._sum += rate
        self._highest = max(self._highest, rate)

    def end_round(self) -> float:
        """An exchange begins. Returns how long the round has lasted."""
        steps = self._sum / self._highest if self._highest > 0.0 else 0.0
        time, self._sum = round(steps * TIME_GRID) / TIME_GRID, 0.0
        self._rule.elapse(time)
        return time

    def state_dict(self) -> dict[str, float]:
        """Everything that affects the next round."""
        return {"sum": self._sum, "highest": self._highest}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take over what `state_dict` gave; None: a run with a fixed interval saved none."""
        state = state or {"sum": 0.0, "highest": 0.0}
        self._sum, self._highest = float(state["sum"]), float(state["highest"])


def learning_time_of(rule: OuterRule) -> LearningTime | None:
    """The learning-rate time that a rule counts in; None: it counts in none."""
    return LearningTime(rule) if isinstance(rule, TimedMomentum) else None
