"""Damaged input, a small number with a fixed seed; the command makes the large one."""

from __future__ import annotations

import json

import pytest

from labs.fuzz import __main__ as fuzz
from labs.fuzz.payloads import whole_payloads


def test_damaged_input_ends_in_our_own_errors(capsys: pytest.CaptureFixture[str]) -> None:
    """2,000 mutated blocks ended in 165 errors of others; a hostfile in DeepSpeed's ValueError."""
    flags = ["--configs", "400", "--hostfiles", "400", "--payloads", "1500", "--returns", "1000"]
    flags += ["--seed", "3"]
    assert fuzz.main(flags) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name, kinds in (
        ("configs", {"ConfigError"}),
        ("hostfiles", {"ConfigError"}),
        ("payloads", {"WireFormatError"}),
        (
            "returns",
            {"CheckpointError", "RankMismatchError", "TransportError", "WireFormatError"},
        ),
    ):
        found = document[name]
        assert found["untyped"] == 0, found["examples"]
        assert set(found["refused"]) == kinds
        assert found["accepted"] + sum(found["refused"].values()) == found["cases"]
        assert 0 < found["accepted"] < found["cases"] / 1.5


def test_an_error_of_others_is_counted_and_shown() -> None:
    def attempt(rng: object) -> None:
        raise ZeroDivisionError("a bug")

    found = fuzz.many(3, 0, attempt)
    assert found["untyped"] == 3
    assert found["examples"][0] == "case 0: ZeroDivisionError: a bug"


def test_what_is_damaged_was_whole() -> None:
    assert len(whole_payloads()) == 4 * 5 * 5 + 1
