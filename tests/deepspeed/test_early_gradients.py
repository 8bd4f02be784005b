"""Gradients that leave while backward goes on: bits of the exchange after it, two processes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.helpers.early_cases import WHOLE
from tests.helpers.fork_ranks import run_forked
from tests.helpers.ranks import results_of

pytestmark = [
    pytest.mark.zero,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(400),
]

ZERO = (
    *("1-overlap", "1-whole", "1-bf16-sums", "2-fp32", "2-loose", "2-single", "2-bf16-single"),
    *("2-fp16", "2-offload"),
)
BLOCKS = (("owners", 0), ("owners", 2), ("median", 0), ("two-bits", 0), ("no-feedback", 2))
LATE = ("zero-1-whole", "zero-1-bf16-sums")
"""Here DeepSpeed's gradients are complete only after backward."""

Case = tuple[str, dict[str, Any]]
SAME: dict[str, Case] = (
    {f"whole-{name}": ("whole", {"name": name}) for name in WHOLE}
    | {f"zero-{name}": ("zero", {"name": name}) for name in ZERO}
    | {f"{name}-{stage}": ("block", {"name": name, "stage": stage}) for name, stage in BLOCKS}
    | {f"overflow-{stage}": ("overflow", {"stage": stage}) for stage in (0, 2)}
    | {name: (name, {}) for name in ("partial_losses", "unsynced", "thawed")}
    | {"checkpointed": ("checkpointed", {"is_reentrant": False})}
)
CHANGED: dict[str, Case] = {
    "reentrant": ("checkpointed", {"is_reentrant": True}),
    "hooked": ("hooked", {}),
}
OTHERS: dict[str, Case] = {name: (name, {}) for name in ("hooks_left", "poisoned", "timed")}
BROKEN: dict[str, Case] = {f"interrupted-{n}": ("interrupted", {"stage": n}) for n in (0, 2)}


@pytest.fixture(scope="module")
def two() -> Any:
    """Name of a case -> its results on both ranks."""
    arguments = {"cases": SAME | CHANGED | OTHERS | BROKEN}
    ranks = run_forked(2, "tests.helpers.early_cases", "run_all", arguments, timeout_s=350)
    return lambda name: results_of(ranks, name)


@pytest.mark.parametrize("name", SAME)
def test_it_has_the_bits_of_the_exchange_after_backward(two: Any, name: str) -> None:
    """Weights after every step, losses, residuals, and what owners owe."""
    one, other = two(name)
    assert one["differs"] == other["differs"] == []
    assert one["crcs"] == other["crcs"]
    assert one["said"] == other["said"] == []
    assert one["owed"] == (name != "no-feedback-2")


@pytest.mark.parametrize("name", sorted(set(SAME) - set(LATE)))
def test_messages_leave_during_backward(two: Any, name: str) -> None:
    assert all(len(answers["early"]) > 5 for answers in two(name))


@pytest.mark.parametrize("name", CHANGED)
def test_a_gradient_that_changes_after_it_has_left_is_exchanged_again(two: Any, name: str) -> None:
    """The part of a tied weight's gradient that came second was lost."""
    for answers in two(name):
        assert answers["differs"] == []
        assert set(answers["early"]) == {3}  # the first pruned step that could
        (said,) = answers["said"]
        assert "in step 3 a gradient changed after it had left" in said


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(two: Any) -> None:
    for message, is_same in two("poisoned"):
        assert "the gradients of rank 1 hold inf or nan in step 5" in message
        assert is_same


@pytest.mark.parametrize("name", BROKEN)
def test_after_a_backward_that_failed_nothing_is_exchanged_any_more(two: Any, name: str) -> None:
    """Ranks may have sent different buckets of it, which nobody could tell apart."""
    for message in two(name):
        assert "a backward has ended in an error while its gradients were on their way" in message


def test_detach_takes_the_hooks_off_the_parameters(two: Any) -> None:
    assert two("hooks_left") == [0, 0]


def test_every_run_is_told_where_its_time_goes(two: Any) -> None:
    """By rank 0, on its screen, in a script that asked for nothing."""
    first, other = two("timed")
    assert other == []
    assert [text.split(":")[1] for text in first] == [" steps 1 to 10", " steps 11 to 20"]
    assert all(re.search(r"codec .*, wire .* exposed, .* hidden$", text) for text in first)
