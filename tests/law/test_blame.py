"""Exchanges that take longer: the network, or hosts that are busy. Recorded series, no clock."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ds_gradprune import law
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.law import blame
from ds_gradprune.law.signals import StepSignals
from ds_gradprune.law.stats import Change, Samples

CALM_S = 0.06
COMPUTES = [0.06, 0.061, 0.059, 0.06, 0.062, 0.06]
"""Seconds of computation on calm hosts."""

BUSY = [*COMPUTES, 0.12, 0.13, 0.12]
"""The last three beside a busy loop."""

EXCHANGES: Samples = tuple((200_000, seconds) for seconds in (0.020, 0.021, 0.020, 0.019, 0.02))

RECORDED = Path(__file__).parent / "recorded"
"""Two ranks on two cores, `nano`, a busy loop on one of the cores, AMD EPYC, 2026-11-27. Over a
loopback it ran in steps 84 to 142, and other programs did in 60 to 65 and 155 to 181. Over an
emulated link of 50 Mbit/s it ran in steps 94 to 153."""

SLOWER = "exchanges became slower (12 Mbit/s)"


def told(
    change: Change | None, computes_s: list[float], seconds: float, former: Samples = EXCHANGES
) -> str:
    now = ((200_000, seconds),) * 3
    return blame.words(change, computes_s, CALM_S, (*former, *now[:-1]), now, " (12 Mbit/s)")


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.05, 0.2, 2.0])
def test_a_slower_network_is_named(seconds: float) -> None:
    assert told("slower", COMPUTES, seconds) == SLOWER


@pytest.mark.parametrize("seconds", [0.035, 0.05, 0.07])
def test_busy_hosts_are_no_slower_network(seconds: float) -> None:
    longer = "computation takes 2.0 times as long"
    assert told("slower", BUSY, seconds) == f"{longer}, and so do exchanges: the hosts are busy"
    assert blame.busy_words(BUSY, CALM_S) == f"{longer}: the hosts are busy"
    assert blame.busy_words(COMPUTES, CALM_S) == ""


def test_a_network_that_falls_beside_busy_hosts_is_named_with_them() -> None:
    assert told("slower", BUSY, 0.4) == f"{SLOWER}, and computation takes 2.0 times as long"


def test_hosts_that_are_calm_again_are_no_faster_network() -> None:
    former = tuple((200_000, 0.045) for _ in range(5))
    again = [0.12, 0.13, 0.12, *COMPUTES[-3:]]
    said = told("faster", again, 0.02, former)
    assert said == "computation and exchanges became faster: the hosts are less busy"
    assert told("faster", COMPUTES, 0.02, former) == "exchanges became faster (12 Mbit/s)"


@pytest.mark.parametrize("seconds", [0.0204, 0.028])
def test_little_is_not_worth_a_word(seconds: float) -> None:
    """A report had "exchanges became slower: 20.5 Mbit/s" after 20.9."""
    assert told("slower", COMPUTES, seconds) == ""
    assert told(None, COMPUTES, 0.4) == ""


def test_larger_exchanges_are_no_slower_network() -> None:
    for seconds, said in ((0.07, ""), (0.32, SLOWER)):
        now = ((800_000, seconds),) * 3
        former = (*EXCHANGES, *now[:-1])
        assert blame.words("slower", COMPUTES, CALM_S, former, now, " (12 Mbit/s)") == said


def test_nothing_is_compared_without_a_past() -> None:
    assert blame.calmer(None, COMPUTES[:3]) is None
    assert blame.busier(COMPUTES, None) == 1.0
    assert told("slower", COMPUTES, 0.4, ()) == SLOWER


def test_hosts_are_busy_for_as_long_as_they_are() -> None:
    """In the middle of the busy loop the law compared one busy step with another."""
    calm_s: float | None = None
    computes_s: list[float] = []
    for seconds in [*COMPUTES, *([0.12] * 100)]:
        computes_s = [*computes_s, seconds][-32:]
        calm_s = blame.calmer(calm_s, sorted(computes_s))
    assert blame.busier(computes_s, calm_s) > 1.5
    assert calm_s is not None
    assert blame.calmer(calm_s, [0.03] * 5) == 0.03


def test_what_is_said_follows_the_reason() -> None:
    assert blame.told("hold", "") == "hold"
    assert blame.told("hold", "so it is") == "hold; so it is"


# --- recorded -------------------------------------------------------------------------------------


def replayed(name: str, *, slow_from: int | None = None, factor: float = 1.0) -> dict[int, str]:
    """The law's reasons at the recorded signals, exchanges longer from a step on."""
    config = GradientPruningConfig(warmup_steps=10, ramp_steps=10, window_size=32)
    state, _ = law.start(config)
    reasons = {}
    with (RECORDED / f"{name}.csv").open() as file:
        for row in csv.DictReader(file):
            known = {key: float(value) if value else None for key, value in row.items()}
            step = int(row["step"])
            comm_s = known["comm_time_s"] or 0.0
            if slow_from is not None and step >= slow_from:
                comm_s *= factor
            signals = StepSignals(
                step=step,
                loss=known["loss"],
                nonfinite=False,
                timed_density=known["timed_density"],
                compute_time_s=known["compute_time_s"],
                codec_time_s=known["codec_time_s"] or 0.0,
                comm_time_s=comm_s,
                step_time_s=known["step_time_s"],
                wire_bytes=int(row["wire_bytes"]),
                dense_bytes=int(row["dense_bytes"]),
                interval=int(row["interval"]),
                timed_unpruned=row["timed_unpruned"] == "1",
            )
            state, decision = law.update(config, state, signals)
            reasons[step] = decision.reason
    return reasons


@pytest.mark.parametrize("name", ["busy_core_loopback", "busy_core_50mbit"])
def test_a_busy_core_is_never_called_a_slower_network(name: str) -> None:
    reasons = replayed(name)
    late = {step: text for step, text in reasons.items() if step > 25}
    assert not [(s, text) for s, text in late.items() if "exchanges became slower" in text]
    assert any("the hosts are busy" in text for text in late.values())


def test_a_link_that_falls_is_named_beside_a_busy_core_and_after_it() -> None:
    for step in (60, 120, 190):
        reasons = replayed("busy_core_50mbit", slow_from=step, factor=8.0)
        said = [s for s, text in reasons.items() if "exchanges became slower" in text and s > 25]
        assert said
        assert step <= said[0] <= step + 4
