"""launch/reply.py: one prompt, a pipe, a conversation; only the reply on stdout."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import reply
from tests.helpers import scripts
from textgen.generate import Replier, Sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("inputs")
    return str(scripts.write_model(folder / "model", scripts.write_text(folder / "text.txt")))


@pytest.fixture(scope="module")
def replier(model: str) -> Replier:
    return Replier.load(model, "cpu")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_flags_are_frozen() -> None:
    flags = [option for action in reply.parser()._actions for option in action.option_strings]
    assert flags == [
        "-h",
        "--help",
        "--model",
        "--prompt",
        "--temperature",
        "--top_p",
        "--max_new_tokens",
        "--seed",
    ]


def test_prompt_gets_one_reply_on_stdout_and_nothing_else(
    model: str, replier: Replier, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", model, "--prompt", "the fox", "--seed", "3", "--max_new_tokens", "9"]
    assert reply.main(given) == 0
    captured = capfd.readouterr()
    sampling = Sampling(seed=3, max_new_tokens=9)
    assert captured.out == replier.reply("the fox", sampling) + "\n"
    assert captured.err == ""


def test_greedy_replies_are_alike(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    replies = []
    for seed in ("1", "2"):
        given = ["--model", model, "--prompt", "the", "--temperature", "0", "--seed", seed]
        assert reply.main(given) == 0
        replies.append(capfd.readouterr().out)
    assert replies[0] == replies[1] != "\n"


def test_piped_text_is_one_prompt(
    model: str,
    replier: Replier,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the fox\nsees\n"))
    assert reply.main(["--model", model, "--temperature", "0", "--max_new_tokens", "9"]) == 0
    wanted = replier.reply("the fox\nsees", Sampling(temperature=0.0, max_new_tokens=9))
    assert capfd.readouterr().out == wanted + "\n"


def test_conversation_remembers_what_was_said(
    model: str,
    replier: Replier,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("the fox\nthe dog\n\nnot read\n"))
    assert reply.main(["--model", model, "--temperature", "0", "--max_new_tokens", "5"]) == 0
    greedy = Sampling(temperature=0.0, max_new_tokens=5)
    first = replier.reply("the fox", greedy)
    second = replier.reply(f"the fox{first}\n\nthe dog", greedy)
    captured = capfd.readouterr()
    assert captured.out == f"{first}\n{second}\n"
    assert captured.err.count("> ") == 3


Break = Callable[[Path], object]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "error: the following arguments are required: --model"),
        (["--model", "./no"], "error: --model must be a model folder or a hub name, got './no'"),
        (["--model", "nano"], "error: --model must be a model folder or a hub name, got 'nano'"),
        (["--model", "MODEL", "--top_p", "2"], "error: --top_p must be greater than 0"),
        (["--model", "MODEL", "--temperature", "hot"], "error: argument --temperature: invalid"),
        (["--model", "DAMAGED"], "error: DAMAGED must be a readable model folder"),
    ],
)
def test_bad_input_is_one_message(
    flags: list[str],
    message: str,
    model: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text('{"model_type": "gpt2"}')
    names = {"MODEL": model, "DAMAGED": str(damaged)}
    given = [names.get(flag, flag) for flag in flags]
    assert reply.main([*given, "--prompt", "x"]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message.replace("DAMAGED", str(damaged)))
    assert captured.err.count("\n") == 1


def test_stdin_that_is_no_text_is_told(
    model: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    raw = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", raw)
    assert reply.main(["--model", model]) == 2
    assert "error: stdin must be UTF-8 text" in capfd.readouterr().err


@pytest.mark.slow
def test_terminal_conversation_streams_and_ends_quietly_on_interrupt(model: str) -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "launch/reply.py", "--model", model, "--seed", "1"],
        cwd=scripts.ROOT,
        env=scripts.script_environ(),
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(terminal)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert "Ctrl-D ends" in process.stderr.readline()
        os.write(controller, b"the fox\n")
        assert process.stdout.read(1) != ""
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(controller)
    assert process.returncode == 130
    assert "Traceback" not in told
