"""What the law decides, and why."""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.law.stats import Within

Density = Annotated[float, Within(1.0 / CHUNK_NUMEL, 1.0)]
"""Kept elements over all elements."""

Interval = Annotated[int, Within(1)]
"""Optimizer steps from one exchange to the next."""

KeptElements = Annotated[int, Within(1, CHUNK_NUMEL)]
"""Kept elements per chunk; CHUNK_NUMEL is dense."""


class Cause(str, enum.Enum):
    """Why a decision is what it is. The order is the order of the law."""

    WARMUP = "warmup"
    RAMP = "ramp"
    PERFORMANCE_MISSED = "performance_missed"
    OVER_BUDGET = "over_budget"
    NETWORK_CHANGED = "network_changed"
    BUDGET_ROOM = "budget_room"
    DENSE_CHEAPER = "dense_cheaper"
    HOLD = "hold"


class Choice(NamedTuple):
    """What one part of the law wants.

    Attributes:
        k: kept elements per chunk, 1 .. CHUNK_NUMEL; CHUNK_NUMEL is dense.
        cause: why; HOLD: it wants no move.
        text: the numbers behind it.
        interval: optimizer steps from one exchange to the next; None: it stays.
    """

    k: int
    cause: Cause
    text: str
    interval: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What holds for one exchange.

    Attributes:
        step: the step that the exchange follows which this decision applies to.
        density: kept / all in pruned segments, in (0, 1]; a multiple of 1 / CHUNK_NUMEL. 1.0 means
            that everything is sent.
        cause: which rule decided.
        reason: one line for a user, with the numbers behind the decision.
        performance: P(t); None while the window is not full.
        budget_s: the step time budget that was applied, seconds; None while unknown.
        network_changed: the change detector fired on the signals of this decision.
        predicted_step_s: what the model expects of a step, seconds; None: nothing was predicted.
        rate_bytes_per_s: the link's rate as the model sees it; None while unknown.
        interval: optimizer steps from the exchange before to this one.
        unpruned: islands that step alone exchange everything, each value in the configuration's
            `unpruned_bits`. A dense exchange sends all of it in fp32.
    """

    step: int
    density: Density
    cause: Cause
    reason: str
    performance: float | None
    budget_s: float | None
    network_changed: bool
    predicted_step_s: float | None = None
    rate_bytes_per_s: float | None = None
    interval: Interval = 1
    unpruned: bool = False


def move(before: int, after: int) -> str:
    """A move of the density for a user, from and to kept elements per chunk."""
    return f"density {name(before)} -> {name(after)}"


def every(before: int, after: int) -> str:
    """A move of the interval for a user."""
    return f"every {before} -> {after} steps"


@functools.lru_cache(maxsize=256)
def name(k: int) -> str:
    """A density for a user."""
    return "dense" if k == CHUNK_NUMEL else f"{100 * k / CHUNK_NUMEL:.2f} %"
