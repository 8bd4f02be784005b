"""What is summed over simulated runs of one law, whatever their links and exchanges."""

from __future__ import annotations

import dataclasses
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from labs.control.score import percentile_95

T = TypeVar("T", bound="Sums")


@dataclass(slots=True)
class Sums(ABC):
    """Sums that every table has.

    Attributes:
        down, up: until settled after a fall of the rate, and after a rise.
        late: over budget after a fall.
        met, meetable: within budget, and those of them that the oracle met.
        steps: behind sums over steps.
        stationary: moves in stationary runs.
        update_us: of single runs.
    """

    down: list[int] = field(default_factory=list)
    up: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    met: int = 0
    meetable: int = 0
    steps: int = 0
    stationary: list[int] = field(default_factory=list)
    update_us: list[float] = field(default_factory=list)

    def merge(self: T, others: Sequence[T]) -> T:
        """This one and others together."""
        for other in others:
            for name in (found.name for found in dataclasses.fields(self)):
                setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    @abstractmethod
    def shares(self) -> dict[str, float | None]:
        """What is compared with the oracle."""

    def figures(self) -> dict[str, Any]:
        """For the table; update_us is the median over the runs."""
        return {
            "settle_down_p95": percentile_95(self.down),
            "settle_up_p95": percentile_95(self.up),
            "late_down_p95": percentile_95(self.late),
            "in_budget": self.met / self.meetable if self.meetable else None,
            **self.shares(),
            "stationary_changes": max(self.stationary) if self.stationary else None,
            "update_us": statistics.median(self.update_us),
        }
