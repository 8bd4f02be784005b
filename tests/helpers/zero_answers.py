"""Reads what ranks have found: kind -> check -> answer, from every rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.helpers.zero_cases import KINDS

Found = list[dict[str, Any]]
"""Of every rank: kind -> check -> answer."""


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
