"""Reads what ranks have found: kind -> check -> answer, from every rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.helpers.zero_cases import KINDS, STEPS

Found = list[dict[str, Any]]
"""Of every rank: kind -> check -> answer."""


ROUNDED = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""Largest relative error of rounding a number."""


def rounding_limit(found: dict[str, Any], kind: str, roundings: int, ranks: int = 4) -> float:
    """How far two runs of SGD may be apart that sum in different orders.

    Gradients of N ranks are added and scaled, with 2 N roundings in the two runs together. The fp32
    weights are rounded a few times per step; copies of lower precision may round to the other
    neighbour, once. Twice all that, because gradients follow the weights.

    Args:
        found: what `zero_cases.warms_up` has found.
        kind: of engine.
        roundings: of a weight, per step.
        ranks: N.
    """
    dtype = KINDS[kind].get("dtype", "fp32")
    unit = ROUNDED[dtype]
    times = STEPS * roundings if dtype == "fp32" else 1
    return 2 * unit * (2 * ranks * STEPS * found["step"] + times * found["weight"])


def kinds(names: Iterable[str]) -> list[Any]:
    """Kinds of engines as parameters; those of a lower precision are marked."""
    precision = pytest.mark.precision
    return [pytest.param(n, marks=[precision] if "dtype" in KINDS[n] else []) for n in names]


def of_all(ranks: Found, kind: str, check: str) -> list[Any]:
    """Every rank's answer."""
    faults = [checks["fault"] for found in ranks for checks in found.values() if "fault" in checks]
    assert not faults, faults[0]
    return [found[kind][check] for found in ranks]


def of_one(ranks: Found, kind: str, check: str) -> Any:
    """The answer that all ranks give alike."""
    answers = of_all(ranks, kind, check)
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def check_shares(found: dict[str, Any], steps: int, exchanges: int | None = None) -> None:
    """What `zero_cases.shares` must have found.

    Args:
        found: its answer.
        steps: that were made.
        exchanges: after which the shared weights have moved; None: after every step.
    """
    assert found["islands"] == [1, 1]  # the ranks of an island have the same weights
    assert found["shared"]
    assert found["density"]
    assert found["steps"] == [steps, steps]
    assert set(found["moves"]) == {exchanges or steps}
    sent, dense = found["bytes"]
    assert 0 < sent < dense
