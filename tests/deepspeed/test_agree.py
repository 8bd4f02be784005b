"""All ranks hear the same sentence about what differs, and nobody waits for a rank that left."""

from __future__ import annotations

import pytest

from ds_gradprune.deepspeed import agree
from ds_gradprune.deepspeed.agree import Facts, check_ranks, gather_texts, raise_together
from ds_gradprune.errors import (
    CheckpointError,
    RankMismatchError,
    TransportTimeout,
    UnsupportedError,
)
from ds_gradprune.wire.transport import Transport
from tests.helpers.loopback_ranks import on_ranks
from tests.helpers.ranks import run_processes


def compared(ranks: list[Facts]) -> str:
    """The one message of all ranks; empty where they agree."""
    answers = on_ranks(len(ranks), lambda t: check_ranks(t, ranks[t.rank]))
    assert len({str(answer) for answer in answers}) == 1
    if answers[0] is None:
        return ""
    assert all(isinstance(answer, RankMismatchError) for answer in answers)
    return str(answers[0])


def test_equal_facts_cost_one_small_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agree, "gather_texts", None)
    facts = Facts({"torch": "2.13.0", "précision": "bf16"}, {"parameter": ["a", "b"]})
    assert compared([facts] * 3) == ""


def test_order_of_the_values_does_not_matter_and_that_of_a_list_does() -> None:
    one, other = {"a": "1", "b": "2"}, {"b": "2", "a": "1"}
    assert Facts(one).digest() == Facts(other).digest()
    assert Facts({}, {"p": ["x", "y"]}).digest() != Facts({}, {"p": ["y", "x"]}).digest()


def test_what_differs_is_named_with_its_ranks_hosts_and_fix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agree.socket, "gethostname", lambda: "alpha")
    facts = [Facts({"torch": version, "numpy": "2.4"}) for version in ("2.13", "2.13", "2.12")]
    assert compared(facts) == (
        "all ranks must run the same thing, but torch is 2.13 on ranks 0-1 of alpha and 2.12 on "
        "rank 2 of alpha. Install the same constraints.txt on every host."
    )


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("law arithmetic", "floating point follows IEEE 754"),
        ("gradient_pruning.density.max", "Copy the same ds_config.json"),
        ("train_micro_batch_size_per_gpu", "Copy the same ds_config.json"),
        ("optimizer.param_groups[0].lr", "Build the same optimizer"),
        ("wire format", "Install the same constraints.txt"),
        ("TrainingArguments.seed", "Pass the same TrainingArguments on every rank."),
        ("training examples", "Give every rank the same training data."),
    ],
)
def test_every_kind_of_fact_has_its_fix(name: str, fix: str) -> None:
    message = compared([Facts({name: "1"}), Facts({name: "2"})])
    assert f"{name} is 1 on rank 0 of " in message
    assert fix in message


def test_the_first_parameter_that_differs_is_named() -> None:
    lines = [f"layer{i}.weight float32 (4, 4) trained" for i in range(500)]
    changed = [*lines[:77], "layer77.weight float32 (4, 8) trained", "another", *lines[79:]]
    message = compared([Facts({}, {"parameter": lines}), Facts({}, {"parameter": changed})])
    assert "parameter 77 is layer77.weight float32 (4, 4) trained on rank 0 of" in message
    assert "and layer77.weight float32 (4, 8) trained on rank 1 of" in message
    assert "layer78" not in message
    assert "Build the same model on every rank" in message


def test_a_model_with_fewer_parameters_is_named() -> None:
    message = compared([Facts({}, {"parameter": ["a"]}), Facts({}, {"parameter": ["a", "b"]})])
    assert "parameter 1 is (absent) on rank 0 of" in message


def test_a_fact_of_another_release_is_absent_elsewhere() -> None:
    assert " and (absent) on rank 1 of " in compared([Facts({"x": "1"}), Facts({})])


def test_a_message_stays_short() -> None:
    many = [Facts({f"fact{i}": f"{i}-{rank}" * 100 for i in range(50)}) for rank in range(8)]
    message = compared(many)
    assert "44 more differ" in message
    assert "2 other values elsewhere" in message
    assert len(message) < 6 * 6 * 150


def test_ranks_of_a_value_are_written_as_ranges() -> None:
    hosts = ["a"] * 4 + ["b"] * 4
    assert agree._values(["x"] * 3 + ["y"] + ["x"] * 2 + ["y", "x"], hosts) == (
        "x on ranks 0-2 of a, ranks 4-5, 7 of b and y on rank 3 of a, rank 6 of b"
    )


def test_hosts_are_those_of_the_ranks() -> None:
    assert agree._ranks(range(20), [f"h{rank}" for rank in range(20)]).endswith(
        "rank 5 of h5, 14 more hosts"
    )


# --- texts and errors -----------------------------------------------------------------------------


def test_texts_of_any_length_arrive_in_rank_order() -> None:
    texts = ["", "é" * 1000, "x"]
    assert on_ranks(3, lambda t: gather_texts(t, texts[t.rank])) == [texts] * 3


def test_nothing_said_by_anybody() -> None:
    assert on_ranks(2, lambda t: gather_texts(t, "")) == [["", ""]] * 2


def test_an_impossible_length_is_no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agree, "MAX_TEXT_BYTES", 10)
    answers = on_ranks(2, lambda t: gather_texts(t, "x" * (5 + 6 * t.rank)))
    assert [str(answer) for answer in answers] == [
        "ranks must tell at most 10 bytes of themselves, got lengths [5, 11]. Install the same "
        "constraints.txt on every host."
    ] * 2


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    def work(transport: Transport) -> None:
        error = UnsupportedError("no such hook") if transport.rank == 1 else None
        raise_together(transport, error)

    answers = on_ranks(3, work)
    assert [type(answer) for answer in answers] == [UnsupportedError] * 3
    assert [str(answer) for answer in answers] == [
        "rank 1: no such hook", "no such hook", "rank 1: no such hook",
    ]  # fmt: skip


def test_own_errors_are_told_before_those_of_others() -> None:
    errors = [CheckpointError("damaged"), UnsupportedError("no hook")]
    answers = on_ranks(2, lambda t: raise_together(t, errors[t.rank]))
    assert answers == errors


def test_no_error_is_no_error() -> None:
    assert on_ranks(2, lambda t: raise_together(t, None)) == [None, None]


def test_a_rank_that_never_comes_ends_in_a_timeout() -> None:
    def work(transport: Transport) -> None:
        if transport.rank == 0:
            check_ranks(transport, Facts({"a": "1"}))

    answers = on_ranks(2, work, timeout_s=0.05)
    assert isinstance(answers[0], TransportTimeout)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_compare_themselves_over_gloo_and_wait_no_longer_than_they_should() -> None:
    arguments = {"timeout_s": 0.5}
    answers = run_processes(2, "tests.helpers.agree_main", "compare_and_leave", arguments)
    assert answers[0][0] == answers[1][0]
    assert answers[0][0].startswith(
        "RankMismatchError: all ranks must run the same thing, but torch"
    )
    assert answers[0][1].startswith("TransportTimeout: all_gather on rank 0 of 2 had no answer")


def test_a_text_of_another_program_is_an_empty_answer() -> None:
    assert agree._object("no JSON") == {}
    assert agree._object("[1]") == {}
