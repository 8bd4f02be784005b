"""Every command line of ours in the documents is one that its own parser takes; short ones run."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ds_gradprune import cli
from ds_gradprune.commands import dispatch
from tests.helpers.documents import DOCUMENTS, ROOT, code_blocks
from tests.helpers.fake_runs import write_run
from tests.helpers.scripts import write_model, write_text

HISTORY = ("LOG.md", "CHANGELOG.md")
"""They tell of commands as they were."""

OPERATORS = {"|", "&&", "||", ";", ">", "<", "&", "|&"}


def lines() -> list[tuple[str, str]]:
    """(document, command line) of all shell blocks, continued lines joined."""
    found = []
    for path in [*DOCUMENTS, ROOT / "launch" / "README.md"]:
        blocks = [block for block in code_blocks(path) if block.language == "sh"]
        text = "\n".join(block.code for block in blocks).replace("\\\n", " ")
        if path.name not in HISTORY:
            found += [(path.name, re.sub(r" +", " ", line)) for line in text.splitlines()]
    return found


def ours(line: str) -> list[tuple[str, list[str]]]:
    """(command, its arguments) of what a line starts; a module's name, or `ds-gradprune NAME`.

    What follows ` -- ` is a command line of its own, and so is a word with spaces in it there.
    """
    words = shlex.split(line, comments=True)
    for number, word in enumerate(words):
        rest = words[number + 1 :]
        rest = rest[: next((i for i, each in enumerate(rest) if each in OPERATORS), len(rest))]
        end = rest.index("--") if "--" in rest else len(rest)
        given, inner = rest[:end], rest[end + 1 :]
        more = ours(shlex.join(inner)) or [each for w in inner if " " in w for each in ours(w)]
        if word.endswith("ds-gradprune") or (word == "ds_gradprune" and words[number - 1] == "-m"):
            return [(f"ds-gradprune {given[0]}", given[1:]), *more]
        script = re.fullmatch(r"(launch|labs|benchmarks|docs)/(\w+)\.py", word)
        if script is not None:
            return [(".".join(script.groups()), given), *more]
        if words[number - 1] == "-m" and word.split(".")[0] in ("labs", "tools", "launch"):
            wants_more = word == "tools.netbed"  # its own parser takes the command as well
            return [(word, rest if wants_more else given), *more]
    return []


COMMANDS = [
    pytest.param(command, arguments, id=f"{name}: {command}")
    for name, line in lines()
    for command, arguments in ours(line)
]


def parser_of(command: str) -> argparse.ArgumentParser:
    """The real parser of a command."""
    name = command.removeprefix("ds-gradprune ")
    if name != command:
        assert name in cli.COMMANDS, f"ds-gradprune has no command {name}"
        own = name in cli.OWN
        command = f"ds_gradprune.commands.{name}" if own else dispatch.TARGETS[name][0]
    module: Any = importlib.import_module(command)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{command}.__main__")
    parser: Callable[[], argparse.ArgumentParser] = module.parser
    return parser()


@pytest.mark.parametrize(("command", "arguments"), COMMANDS)
def test_its_parser_takes_the_line(
    command: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    parser_of(command).parse_args(arguments)  # raises, or exits with code 2


def test_an_unknown_flag_is_found() -> None:
    with pytest.raises(Exception, match="unrecognized arguments: --epochs"):
        parser_of("launch.train").parse_args(["--epochs", "3"])


def test_lines_are_taken_apart() -> None:
    assert ours("FOO=1 mpirun -n 2 .venv/bin/python launch/train.py --steps 3 | tee log") == [
        ("launch.train", ["--steps", "3"])
    ]
    assert ours("sudo python -m tools.netbed --hosts 2 -- sh -c 'ds-gradprune plot a'")[1] == (
        "ds-gradprune plot",
        ["a"],
    )
    assert ours("pip install .") == []


def test_there_are_lines_to_check() -> None:
    named = {parameters.values[0] for parameters in COMMANDS}
    assert {f"ds-gradprune {name}" for name in ("doctor", "plot", "report", "serve")} <= named
    assert {"launch.train", "launch.finetune", "tools.netbed"} <= named
    assert len(COMMANDS) >= 14


# --- those that take a moment are run -------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the documents assume it: runs of before, with their models."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("first", "second", "quickstart", "mine"):
        write_run(folder / "runs" / name, steps=60)
    text = write_text(folder / "text.txt")
    for name in ("quickstart", "mine"):
        write_model(folder / "runs" / name / "model", text)
    return folder


SHORT = ("ds-gradprune plot", "ds-gradprune report", "ds-gradprune reply", "docs.check_prose")


@pytest.mark.parametrize(
    ("command", "arguments"), [each for each in COMMANDS if each.values[0] in SHORT]
)
def test_it_runs(
    command: str,
    arguments: list[str],
    desk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    monkeypatch.chdir(desk)
    module: Any = importlib.import_module("docs.check_prose")
    name = command.removeprefix("ds-gradprune ")
    code = module.main(arguments) if name == command else cli.main([name, *arguments])
    # Prose has findings at times; the script ran all the same.
    assert code == 0 or name == "docs.check_prose"
    assert capsys.readouterr().out
