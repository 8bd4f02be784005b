"""Exchanges that take longer: the network, or hosts that are busy. Recorded series, no clock."""

from __future__ import annotations

import pytest

from ds_gradprune.law import blame
from ds_gradprune.law.stats import Samples

COMPUTES = [0.06, 0.061, 0.059, 0.06, 0.062, 0.06]
"""Seconds of computation on an idle host."""

EXCHANGES: Samples = tuple((200_000, seconds) for seconds in (0.020, 0.021, 0.020, 0.019, 0.02))


def told(change, computes_s, now, former=EXCHANGES, rate=" (12 Mbit/s)") -> str:
    return blame.words(change, computes_s, (*former, *now[:-1]), tuple(now), rate)


@pytest.mark.parametrize("seconds", [0.05, 0.2, 2.0])
def test_a_slower_network_is_named(seconds: float) -> None:
    assert told("slower", COMPUTES, [(200_000, seconds)] * 3) == (
        "exchanges became slower (12 Mbit/s)"
    )


@pytest.mark.parametrize("seconds", [0.02, 0.04, 0.06])
def test_busy_hosts_are_no_slower_network(seconds: float) -> None:
    said = told("slower", [*COMPUTES, 0.12, 0.13, 0.12], [(200_000, seconds)] * 3)
    assert said.startswith("computation takes 2.0 times as long")
    assert said.endswith("the hosts are busy")
    assert "Mbit/s" not in said


def test_a_network_that_falls_beside_busy_hosts_is_named_with_them() -> None:
    said = told("slower", [*COMPUTES, 0.12, 0.13, 0.12], [(200_000, 0.4)] * 3)
    assert said == ("exchanges became slower (12 Mbit/s), and computation takes 2.0 times as long")


def test_larger_exchanges_are_no_slower_network() -> None:
    assert blame.slower(EXCHANGES, ((800_000, 0.07),) * 3) == 1.0
    assert blame.slower(EXCHANGES, ((800_000, 0.32),) * 3) == pytest.approx(4.0)


def test_hosts_that_are_free_again_are_no_faster_network() -> None:
    former = tuple((200_000, 0.045) for _ in range(5))
    busy = [0.12, 0.13, 0.12, 0.12, 0.12]
    now = [(200_000, 0.02)] * 3
    said = told("faster", [*busy, 0.06, 0.06, 0.06], now, former)
    assert said == "computation and exchanges became faster: the hosts are less busy"
    assert told("faster", busy, now, former) == "exchanges became faster (12 Mbit/s)"


def test_two_hundredths_are_not_worth_a_word() -> None:
    assert told("slower", COMPUTES, [(200_000, 0.0204)] * 3) == ""
    assert told(None, COMPUTES, [(200_000, 0.4)] * 3) == ""


def test_nothing_is_compared_without_a_past() -> None:
    assert blame.busier(COMPUTES[:3]) is None
    assert blame.busy_words(COMPUTES[:3]) == ""
    assert blame.slower((), ((200_000, 0.4),)) is None
    assert told("slower", [], [(200_000, 0.4)], ()) == "exchanges became slower (12 Mbit/s)"


def test_where_it_stands_in_a_reason() -> None:
    assert blame.told("hold", "") == "hold"
    assert blame.told("hold", "so it is") == "hold; so it is"
    assert blame.told("density 1 -> 2", "so it is", leads=True) == "so it is: density 1 -> 2"
