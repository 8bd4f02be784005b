"""The link rate below which a compressed exchange beats the dense one: predicted, checked. Pure.

The model. A step takes what it takes on this host (compute and codec) plus its exchange. On a link
of r bits per second the exchange of B bytes cannot take less than 8 B / r; and on no link does it
take less than the software does, which is what an unshaped link shows. The two go on at once:

    T(r) = local + max(unshaped exchange, 8 B / r)

All numbers come from the unshaped runs, B being counted at the interface, TCP included. Nothing of
what is measured at a rate enters the prediction for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from labs.race.figures import Row

LEAST_MBIT, MOST_MBIT = 0.01, 1e6


@dataclass(frozen=True, slots=True)
class Cost:
    """What the model knows of a method.

    Attributes:
        local_s: compute and codec, seconds.
        exchange_s: on an unshaped link, seconds.
        wire_bytes: sent per host and step.
    """

    local_s: float
    exchange_s: float
    wire_bytes: float

    def step_time_s(self, rate_mbit: float | None) -> float:
        """Predicted seconds of a step; None: unshaped."""
        wire_s = 0.0 if rate_mbit is None else 8.0 * self.wire_bytes / (rate_mbit * 1e6)
        return self.local_s + max(self.exchange_s, wire_s)


def cost_of(row: Row) -> Cost | None:
    """From a row of an unshaped link; None where no bytes were counted."""
    if row.wire_bytes is None:
        return None
    return Cost(row.step_time_s - row.exposed_comm_s, row.exposed_comm_s, row.wire_bytes)


def break_even_mbit(dense: Cost, pruned: Cost) -> float | None:
    """The rate below which `pruned` is faster; None if it is at every rate or at none.

    The difference T_dense(r) - T_pruned(r) does not grow with r as long as dense sends more, so
    there is at most one such rate.
    """
    if pruned.wire_bytes >= dense.wire_bytes:
        return None

    def wins(rate: float) -> bool:
        return pruned.step_time_s(rate) < dense.step_time_s(rate)

    low, high = math.log(LEAST_MBIT), math.log(MOST_MBIT)
    if not wins(LEAST_MBIT) or wins(MOST_MBIT):
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if wins(math.exp(middle)) else (low, middle)
    return math.exp(low)


def check(rows: Sequence[Row], dense: str, pruned: str) -> list[dict[str, Any]]:
    """Predicted and measured step times at every shaped rate, and who is faster.

    Args:
        rows: all rows, unshaped ones included.
        dense: method that is compared with.
        pruned: method that is compared.
    """
    costs = {row.method: cost_of(row) for row in rows if row.rate_mbit is None}
    measured = {(row.method, row.rate_mbit): row.step_time_s for row in rows}
    checks = []
    for rate in dict.fromkeys(row.rate_mbit for row in rows):
        pair = [(costs.get(name), measured.get((name, rate))) for name in (dense, pruned)]
        if rate is None or any(cost is None or time_s is None for cost, time_s in pair):
            continue
        predicted = [cost.step_time_s(rate) for cost, _ in pair]
        found = [time_s for _, time_s in pair]
        checks.append(
            {
                "rate_mbit": rate,
                "dense_predicted_s": predicted[0],
                "dense_measured_s": found[0],
                "pruned_predicted_s": predicted[1],
                "pruned_measured_s": found[1],
                "speedup_predicted": predicted[0] / predicted[1],
                "speedup_measured": found[0] / found[1],
            }
        )
    return checks
