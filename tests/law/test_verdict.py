"""The verdict of a run's first exchanges."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ds_gradprune.law.decision import Cause
from ds_gradprune.law.verdict import WANTED, FirstVerdict, Verdict, break_even_mbit


@dataclass(frozen=True)
class Next:
    """What the verdict reads of a decision."""

    rate_bytes_per_s: float | None = None


@dataclass(frozen=True)
class Exchange:
    """What the verdict reads of a report."""

    density: float
    step_time_s: float | None
    comm_time_s: float
    wire_bytes: int
    steps: int = 1
    cause: Cause = Cause.HOLD
    nonfinite: bool = False
    codec_time_s: float = 0.0
    dense_bytes: int = 40_000_000
    decision: Next = Next()


DENSE = Exchange(1.0, 4.1, 4.0, 40_000_000)
PRUNED = Exchange(0.05, 0.6, 0.2, 2_000_000)


def run(*exchanges: Exchange) -> list[Verdict | None]:
    verdict = FirstVerdict()
    return [verdict.see(exchange) for exchange in exchanges]


def test_said_once_after_enough_exchanges() -> None:
    said = run(*[DENSE] * 5, *[PRUNED] * 12)
    assert [v is not None for v in said] == [n == 4 + WANTED for n in range(17)]


def test_numbers_and_words() -> None:
    (verdict,) = (v for v in run(*[DENSE] * 5, *[PRUNED] * WANTED) if v)
    assert verdict.dense_step_s == 4.1
    assert verdict.pruned_step_s == 0.6
    # Local time grows from 0.1 to 0.4 s, and 38 MB are spared.
    assert verdict.break_even_mbit == pytest.approx(8 * 38 / 0.3)
    assert verdict.pays
    assert verdict.text == (
        "dense 4.1 s a step, pruned 0.6 s (density 5 %), break-even 1013 Mbit/s: pruning pays "
        "here, 6.8 times as fast"
    )


def test_a_codec_without_time_has_no_break_even() -> None:
    free = Exchange(0.05, 0.2, 0.1, 2_000_000)
    (verdict,) = (v for v in run(*[DENSE] * 4, *[free] * WANTED) if v)
    assert "faster at any link rate: pruning pays here" in verdict.text


def test_first_dense_steps_do_not_count() -> None:
    slow = Exchange(1.0, 60.0, 4.0, 40_000_000)
    (verdict,) = (v for v in run(slow, slow, DENSE, *[PRUNED] * WANTED) if v)
    assert verdict.dense_step_s == 4.1


def test_intervals_count_per_step() -> None:
    rounds = Exchange(0.05, 3.0, 0.5, 2_000_000, steps=5)
    (verdict,) = (v for v in run(*[DENSE] * 4, *[rounds] * WANTED) if v)
    assert verdict.pruned_step_s == 0.6
    assert verdict.interval == 5
    assert "one exchange in 5 steps" in verdict.text


def test_bad_news_wait_for_the_end_of_the_ramp() -> None:
    ramp = Exchange(0.25, 4.0, 0.2, 10_000_000, cause=Cause.RAMP)
    after = Exchange(0.05, 3.9, 0.1, 2_000_000)
    said = run(*[DENSE] * 4, *[ramp] * 10, after)
    assert [v for v in said[:-1] if v] == []
    assert said[-1] is not None
    assert not said[-1].pays
    assert "hardly pays" in said[-1].text


def test_good_news_do_not() -> None:
    ramp = Exchange(0.25, 1.0, 0.8, 10_000_000, cause=Cause.RAMP)
    assert run(*[DENSE] * 4, *[ramp] * WANTED)[-1] is not None


def test_slower_is_called_so() -> None:
    slower = Exchange(0.05, 5.0, 0.1, 2_000_000)
    (verdict,) = (v for v in run(*[DENSE] * 4, *[slower] * WANTED) if v)
    assert "does not pay here. Set gradient_pruning.enabled to false" in verdict.text


def test_without_dense_steps_one_is_estimated() -> None:
    few_bits = Exchange(1.0, 0.9, 0.8, 5_000_000)
    known = Exchange(
        0.05, 3.0, 0.5, 2_000_000, steps=5, codec_time_s=0.5, decision=Next(10_000_000.0)
    )
    (verdict,) = (v for v in run(*[few_bits] * 9, *[known] * WANTED) if v)
    assert verdict.dense_step_s == pytest.approx(0.4 + 4.0)
    assert verdict.is_estimated
    assert "dense 4.4 s a step (estimated from the link's rate), pruned 0.6 s" in verdict.text


def test_nothing_is_said_without_dense_steps_and_rate_or_times() -> None:
    unknown = Exchange(0.05, None, 0.2, 2_000_000)
    failed = Exchange(0.05, 0.6, 0.2, 2_000_000, nonfinite=True)
    assert not any(run(*[PRUNED] * 20))
    assert not any(run(*[DENSE] * 5, *[unknown] * 20, *[failed] * 20))


def test_dense_steps_of_the_law_are_not_the_warmup() -> None:
    later = Exchange(1.0, 100.0, 99.0, 40_000_000)
    said = run(*[DENSE] * 4, PRUNED, later, later, *[PRUNED] * (WANTED - 1))
    assert said[-1] is not None
    assert said[-1].dense_step_s == 4.1


@pytest.mark.parametrize(
    ("extra_s", "saved_bytes", "rate"), [(1.0, 1e6, 8.0), (0.0, 1e6, None), (1.0, 0.0, 0.0)]
)
def test_break_even(extra_s: float, saved_bytes: float, rate: float | None) -> None:
    assert break_even_mbit(extra_s, saved_bytes) == rate
