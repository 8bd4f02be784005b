"""Flags: faults are errors of ours, and nothing is abbreviated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ds_gradprune.errors import ConfigError
from launch.support.flags import ScriptParser, name_or_path, natural, path, positive
from launch.support.settings import OWN_TEXT, read_settings


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


def test_paths_may_be_anything_that_a_system_could_hold(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for good in (tmp_path, tmp_path / "absent", tmp_path / "file" / "below"):
        assert path(str(good)) == good
    assert name_or_path("gpt2") == "gpt2"


@pytest.mark.parametrize("text", ["x" * 300, "x/" * 3000, "\0"])
@pytest.mark.parametrize("kind", [path, name_or_path])
def test_paths_that_no_system_can_hold_raise(kind: Callable[[str], object], text: str) -> None:
    """--out with a name of 300 characters was a traceback."""
    flags = ScriptParser("A script.")
    flags.add_argument("--out", type=kind)
    with pytest.raises(ConfigError, match=r"argument --out: must be a path, got .*: "):
        flags.parse_args(["--out", text])


def test_a_short_run_fits_the_configuration_that_nobody_chose(tmp_path: Path) -> None:
    """`--steps 60` without `--config` ended in an error about a window of 64."""
    out = ["--out", str(tmp_path / "run")]
    short = read_settings(["--steps", "60", *out])
    keys = [short.block.warmup_steps, short.block.ramp_steps, short.block.window_size]
    assert keys == [7, 7, 15]
    assert short.note == "note: for 60 steps it takes warmup_steps 7, ramp_steps 7, window_size 15"
    whole = read_settings(out)
    assert (whole.note, whole.block.window_size) == ("", 64)
    chosen = tmp_path / "own.json"
    chosen.write_text(OWN_TEXT.read_text())
    with pytest.raises(ConfigError, match="window_size must be less than the run's 60 steps"):
        read_settings(["--steps", "60", "--config", str(chosen), *out])
