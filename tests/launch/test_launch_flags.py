"""Flags: faults are errors of ours, and nothing is abbreviated."""

from __future__ import annotations

import pytest

from ds_gradprune.errors import ConfigError
from launch.support.flags import ScriptParser, natural, positive


@pytest.fixture
def parser() -> ScriptParser:
    flags = ScriptParser("A script.")
    flags.add_argument("--steps", type=positive)
    flags.add_argument("--seed", type=natural)
    return flags


def test_good_flags_are_parsed(parser: ScriptParser) -> None:
    flags = parser.parse_args(["--steps", "1", "--seed", "0"])
    assert (flags.steps, flags.seed) == (1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], r"argument --steps: must be a whole number >= 1, got '0'\. See --help"),
        (["--steps", "1.5"], r"must be a whole number >= 1, got '1\.5'"),
        (["--seed", "-1"], r"expected one argument|must be a whole number >= 0"),
        (["--step", "5"], r"unrecognized arguments: --step 5"),
        (["words"], r"unrecognized arguments: words"),
    ],
)
def test_bad_flags_raise(
    parser: ScriptParser, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        parser.parse_args(arguments)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
