"""launch/train.py on one process: flags, faults, a run and its continuation.

Longer than 300 lines: every flag and fault of one script.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launch import train
from launch.support import settings
from tests.helpers import scripts
from tests.helpers.scripts import RESULT_KEYS, arguments, block

# DeepSpeed and the libraries it imports warn of their own use of torch.
pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("default")]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[str]], int]]:
    """The script's main, in this process, with everything it changes changed back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environ = dict(os.environ)
    for name in set(environ) - set(scripts.script_environ()):
        del os.environ[name]

    def run_and_forget(arguments: list[str]) -> int:
        try:
            return train.main(arguments)
        finally:
            forget_deepspeed()

    yield run_and_forget
    os.environ.clear()
    os.environ.update(environ)
    for number, handler in before.items():
        signal.signal(number, handler)
    logger = logging.getLogger("ds_gradprune")
    logger.handlers, logger.propagate = [], True


def forget_deepspeed() -> None:
    """Let the next run of this process find DeepSpeed as if just imported: no group, no backend."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("deepspeed.comm.comm", "deepspeed.utils.groups"):
        module = sys.modules.get(name)
        for variable in ("cdb", "_WORLD_GROUP"):
            if module is not None and hasattr(module, variable):
                setattr(module, variable, None)


# --- flags and faults -----------------------------------------------------------------------------


def test_flags_are_frozen() -> None:
    flags = [option for action in settings.parser()._actions for option in action.option_strings]
    assert set(flags) == {
        "-h",
        "--help",
        "--config",
        "--model",
        "--text",
        "--steps",
        "--out",
        "--resume",
        "--seed",
        "--eval-every",
        "--save-every",
        "--local_rank",
    }
    assert len(flags) - 2 <= 10


def bad_config(here: Path, tmp_path: Path, **changes: Any) -> list[str]:
    path = scripts.write_config(tmp_path / "bad.json", **changes)
    return arguments(here, tmp_path / "out", config=str(path))


def raw_config(here: Path, tmp_path: Path, content: str) -> list[str]:
    (tmp_path / "bad.json").write_text(content)
    return arguments(here, tmp_path / "out", config=str(tmp_path / "bad.json"))


def bad_text(here: Path, tmp_path: Path, content: bytes) -> list[str]:
    (tmp_path / "bad.txt").write_bytes(content)
    return arguments(here, tmp_path / "out", text=str(tmp_path / "bad.txt"))


def bad_model(here: Path, tmp_path: Path, damage: Callable[[Path], object]) -> list[str]:
    shutil.copytree(here / "model", tmp_path / "bad")
    damage(tmp_path / "bad")
    return arguments(here, tmp_path / "out", model=str(tmp_path / "bad"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


Make = Callable[[Path, Path], list[str]]

FAULTS: dict[str, tuple[Make, str]] = {
    "bad flag": (
        lambda h, t: arguments(h, t / "out", steps="0"),
        "--steps: must be a whole number",
    ),
    "unknown flag": (lambda h, t: [*arguments(h, t / "out"), "--lr", "1"], "unrecognized"),
    "absent config": (
        lambda h, t: arguments(h, t, config=str(t / "no")),
        "must be a file that exists",
    ),
    "no JSON": (lambda h, t: raw_config(h, t, "{"), "cannot be read as JSON"),
    "text that trips its reader": (
        lambda h, t: raw_config(h, t, "{a: 1e999}"),
        "cannot be read as JSON",
    ),
    "path too long": (lambda h, t: arguments(h, t / ("x" * 300)), "--out: must be a path, got"),
    "no object": (lambda h, t: raw_config(h, t, "[1]"), "must hold an object"),
    "key twice": (lambda h, t: raw_config(h, t, '{"a": 1, "a": 2}'), "a must be given once"),
    "no block": (
        lambda h, t: bad_config(h, t, gradient_pruning=None),
        "gradient_pruning must be present",
    ),
    "unknown key": (
        lambda h, t: bad_config(h, t, **block(windw_size=3)),
        'gradient_pruning.windw_size is not a known key. Did you mean "window_size"?',
    ),
    "wrong type": (
        lambda h, t: bad_config(h, t, **block(warmup_steps="many")),
        'gradient_pruning.warmup_steps must be a whole number, got "many"',
    ),
    "window too large": (
        lambda h, t: bad_config(h, t, **block(window_size=12)),
        "gradient_pruning.window_size must be less than the run's 12 steps",
    ),
    "no optimizer": (lambda h, t: bad_config(h, t, optimizer=None), "optimizer must be present"),
    "absent text": (lambda h, t: arguments(h, t / "out", text=str(t / "no")), "does not exist"),
    "no text in the folder": (
        lambda h, t: arguments(h, t / "out", text=str(h / "model")),
        "must hold text files, but has none",
    ),
    "empty text": (lambda h, t: bad_text(h, t, b""), "must hold text, but is empty"),
    "no UTF-8": (lambda h, t: bad_text(h, t, b"caf\xe9"), "must be UTF-8 text"),
    "no model": (lambda h, t: arguments(h, t / "out", model="./no"), "--model must be nano"),
    "no model_type": (
        lambda h, t: bad_model(h, t, lambda f: (f / "config.json").write_text("{}")),
        "must name a model_type",
    ),
    # Two limits were told one after the other, the right one after the text was tokenized.
    "stage of another mode": (
        lambda h, t: bad_config(h, t, zero_optimization={"stage": 3}),
        'zero_optimization.stage 3 with prune = "gradient" (stages that it takes: 0, 1, 2)',
    ),
    # Found later, when DeepSpeed is up and the run folder has been begun:
    "batch sizes": (
        lambda h, t: bad_config(h, t, train_batch_size=7),
        "DeepSpeed refuses the configuration: Check batch related parameters",
    ),
    "unknown optimizer option": (
        lambda h, t: bad_config(h, t, fp16={"enabled": "perhaps"}),
        "DeepSpeed refuses the configuration",
    ),
    "short text": (
        lambda h, t: bad_text(h, t, b"the fox sees the dog\n" * 4),
        "must give at least two sequences of 32 tokens",
    ),
    "less than one batch": (
        lambda h, t: bad_text(h, t, b"the fox sees the dog. "[:21] * 16),
        "must give at least one global batch of 4 sequences of 32 tokens",
    ),
    "cut weights": (
        lambda h, t: bad_model(h, t, lambda f: cut(f / "model.safetensors")),
        "must be a readable model folder",
    ),
    "no tokenizer": (
        lambda h, t: bad_model(h, t, lambda f: (f / "tokenizer.json").unlink()),
        "must hold a tokenizer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_message_and_leaves_nothing(
    fault: str,
    here: Path,
    tmp_path: Path,
    main: Callable[[list[str]], int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    make, message = FAULTS[fault]
    given = make(here, tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    assert main(given) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert message in told[0]
    assert {path.name for path in tmp_path.iterdir()} == before


def test_folder_with_files_is_refused_and_untouched(
    here: Path,
    tmp_path: Path,
    main: Callable[[list[str]], int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "precious").write_text("x")
    assert main(arguments(here, tmp_path)) == 2
    assert "Continue that run with --resume" in capfd.readouterr().err
    assert main([*arguments(here, tmp_path), "--resume"]) == 2
    assert "--resume must find a checkpoint" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_several_hosts_without_an_address_are_refused(
    here: Path,
    tmp_path: Path,
    main: Callable[[list[str]], int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in (("RANK", "0"), ("SIZE", "4"), ("LOCAL_RANK", "0"), ("LOCAL_SIZE", "2")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert main(arguments(here, tmp_path / "out")) == 2
    assert "error: MASTER_ADDR must be set" in capfd.readouterr().err


# --- one process ----------------------------------------------------------------------------------


def test_one_process_trains_and_says_that_pruning_is_idle(
    here: Path,
    tmp_path: Path,
    main: Callable[[list[str]], int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main(arguments(here, out, steps="30")) == 0
    shown = capfd.readouterr().err
    assert "pruning is idle" in shown
    assert "validation loss" in shown
    result = json.loads((out / "result.json").read_text())
    assert set(result) >= RESULT_KEYS
    assert (result["steps"], result["stopped"]) == (30, False)
    assert result["val_loss"] < result["val_loss_start"] - 0.5
    assert (result["wire_bytes"], result["density_min"]) == (0, None)
    written = json.loads((out / "validation.json").read_text())
    assert written == {"val_losses": result["val_losses"], "own_val_losses": []}
    assert re.search(r"step 30/30  loss \d.*  tokens/s [\d,]+  time ", shown)
    log = scripts.log_of(out)
    assert [entry["step"] for entry in log] == list(range(1, 31))
    assert set(log[0]) == {"step", "loss", "step_time_s"}
    # A finished run that is resumed with more steps goes on; every other flag must be the same.
    capfd.readouterr()
    assert main([*arguments(here, out, steps="33", seed="1"), "--resume"]) == 2
    assert "--seed must be 0 as in the run that is resumed, got 1" in capfd.readouterr().err
    assert main([*arguments(here, out, steps="33"), "--resume"]) == 0
    assert "resumed after step 30" in capfd.readouterr().err
    again = json.loads((out / "result.json").read_text())
    assert (again["steps"], again["val_loss_start"]) == (33, result["val_loss_start"])


def test_damaged_checkpoint_is_one_message(
    here: Path,
    tmp_path: Path,
    main: Callable[[list[str]], int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main(arguments(here, out, steps="5")) == 0
    cut(next(out.glob("checkpoints/step*/mp_rank_00_model_states.pt")))
    capfd.readouterr()
    assert main([*arguments(here, out, steps="6"), "--resume"]) == 2
    told = capfd.readouterr().err
    assert "must be readable" in told
    assert "Traceback" not in told
    assert (out / "model").is_dir()  # what was there before stays
    (out / "checkpoints" / "latest").write_text("step99999999")
    assert main([*arguments(here, out, steps="6"), "--resume"]) == 2
    told = capfd.readouterr().err
    assert f"{out / 'checkpoints'} must hold the checkpoint that its file latest names" in told
    assert "Traceback" not in told


def test_script_ends_with_code_two_and_no_traceback(here: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "launch/train.py", *arguments(here, tmp_path / "out", text="no.txt")],
        cwd=scripts.ROOT,
        env=scripts.script_environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        == "error: --text must name a file or a folder, but no.txt does not exist."
    )
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()
