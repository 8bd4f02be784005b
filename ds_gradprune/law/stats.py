"""Small statistics that all parts of the law share, and the numbers they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, TypeAlias, TypeGuard, TypeVar

LEAST_S, MOST_S = 1e-9, 1e9
"""No clock has measured less than a nanosecond, and nothing lasts longer than thirty years."""

Number = TypeVar("Number", int, float)


class Within(NamedTuple):
    """Bounds of a number in a state, as an `Annotated` hint; `state.from_plain` checks them."""

    least: float
    most: float = float("inf")


Count: TypeAlias = Annotated[int, Within(0)]
"""A whole number, at least 0."""

Bytes: TypeAlias = Annotated[int, Within(1)]
"""What one rank sent in an exchange."""

Seconds: TypeAlias = Annotated[float, Within(LEAST_S, MOST_S)]
"""What a clock can have measured."""

Samples: TypeAlias = tuple[tuple[Bytes, Seconds], ...]
"""(bytes, seconds) of exchanges, oldest first."""

Change: TypeAlias = Literal["slower", "faster"]
"""How the network has changed."""


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    ordered = sorted(values)
    numel = len(ordered)
    half = numel // 2
    return ordered[half] if numel % 2 else 0.5 * (ordered[half - 1] + ordered[half])


def clamp(x: Number, least: Number, most: Number) -> Number:
    """The number, or the bound that it is beyond; `least` for nan."""
    # The law asks ten times a step, and `max(least, min(x, most))` takes several times as long.
    return x if least < x < most else most if x >= most else least


def is_time(time_s: float | None) -> TypeGuard[float]:
    """Whether a clock can have measured it."""
    return time_s is not None and LEAST_S <= time_s <= MOST_S  # False for nan, too


def keep_last(values: tuple[float, ...], value: float | None, most: int) -> tuple[float, ...]:
    """The values, and one more if it is a time, cut to the newest `most`."""
    return (*values, value)[-most:] if is_time(value) else values
