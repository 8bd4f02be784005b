"""The command line: finds commands, tells faults in one line, and stays light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ds_gradprune
from ds_gradprune import cli
from ds_gradprune.commands import dispatch
from ds_gradprune.commands.flags import count, not_negative, numbers
from ds_gradprune.errors import ConfigError, MissingDependencyError

HEAVY = ("torch", "matplotlib", "transformers", "deepspeed", "numpy")


def loaded_by(code: str, repo_root: Path) -> set[str]:
    """Which heavy packages a piece of code loads."""
    code += f"\nimport json, sys; print(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import ds_gradprune",
        "from ds_gradprune import cli; cli.main(['--help'])",
        "from ds_gradprune import cli; cli.main(['--version'])",
    ],
)
def test_nothing_heavy_is_loaded(code: str, repo_root: Path) -> None:
    assert loaded_by(code, repo_root) == set()


@pytest.mark.parametrize("name", cli.OWN)
def test_help_of_own_commands_loads_neither_torch_nor_matplotlib(
    name: str, repo_root: Path
) -> None:
    code = (
        "import contextlib\nfrom ds_gradprune import cli\n"
        f"with contextlib.suppress(SystemExit): cli.main(['{name}', '--help'])"
    )
    assert loaded_by(code, repo_root) <= {"numpy"}


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert cli.main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert ds_gradprune.__version__ in capsys.readouterr().out


def test_unknown_command_and_flag_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dokter"]) == 2
    assert "'dokter' is not a command" in capsys.readouterr().err
    assert cli.main(["plot", "--nonsense", "x"]) == 2
    assert "error: unrecognized arguments: --nonsense" in capsys.readouterr().err


def test_module_runs_as_the_command(repo_root: Path) -> None:
    words = [sys.executable, "-m", "ds_gradprune", "plot", "nowhere"]
    done = subprocess.run(words, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere must be a run folder with log.jsonl, or a log")


# --- the example's commands -----------------------------------------------------------------------


class Example:
    """A module of the example that notes what it was called with."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def main(self, arguments: list[str]) -> int:
        self.called = arguments
        return 7


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Example:
    made = Example()
    monkeypatch.setitem(sys.modules, "textgen.launch.train", made)
    return made


def test_arguments_are_handed_on(example: Example) -> None:
    assert cli.main(["--local_rank=1", "train", "--steps", "3"]) == 7
    assert example.called == ["--steps", "3", "--local_rank=1"]


def test_shipped_configuration_has_a_name(example: Example) -> None:
    cli.main(["train", "--config", "ethernet_100mbit"])
    path = Path(example.called[1])
    assert path.name == "ethernet_100mbit.json"
    assert "gradient_pruning" in json.loads(path.read_text(encoding="utf-8"))


def test_own_configuration_stays(example: Example) -> None:
    cli.main(["train", "--config", "mine.json"])
    assert example.called[1] == "mine.json"


def test_unknown_configuration_names_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match=r"dense, ethernet_100mbit, .*, got 'ethernet'"):
        dispatch.shipped_config("ethernet")


def test_exit_of_the_module_is_taken(example: Example) -> None:
    codes: list[int] = []
    example.end_process = codes.append
    cli.main(["train"])
    assert codes == [7]


def test_missing_package_says_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` without uvicorn ended in a traceback."""
    monkeypatch.setitem(dispatch.NEEDS, "serve", ("package_that_nobody_has",))
    with pytest.raises(MissingDependencyError, match=r"ds_gradprune\[deepspeed,textgen,serve\]"):
        dispatch.run("serve", [])


@pytest.mark.parametrize("name", dispatch.TARGETS)
def test_every_command_of_the_example_has_flags(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    assert f"usage: ds-gradprune {name} " in capsys.readouterr().out


# --- flags ----------------------------------------------------------------------------------------


def test_numbers_are_sorted_and_unique() -> None:
    assert numbers("100,10,100") == (10.0, 100.0)
    assert not_negative("0") == 0.0
    assert count("3") == 3


@pytest.mark.parametrize("text", ["", "10,", "0", "-1", "nan", "inf", "x"])
def test_other_numbers_are_refused(text: str) -> None:
    import argparse

    with pytest.raises(argparse.ArgumentTypeError, match="must be a number above 0"):
        numbers(text)
