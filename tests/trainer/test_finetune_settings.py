"""The command line of launch/finetune.py and the shipped configurations behind it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_gradprune.config import load_block
from ds_gradprune.errors import ConfigError, MissingDependencyError
from launch.support.tuning_model import check_model
from launch.support.tuning_settings import (
    DEFAULT_CONFIG,
    LEARNING_RATE,
    filled_config,
    read_tuning_settings,
)

pytestmark = pytest.mark.trainer

FILES = sorted(DEFAULT_CONFIG.parent.glob("finetune_*.json"))


def parsed(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_are_valid_and_need_no_compiler(path: Path) -> None:
    config = parsed(path)
    load_block(config, total_steps=200)
    assert config["optimizer"]["params"]["torch_adam"] is True  # else DeepSpeed compiles its own
    assert config["zero_optimization"]["stage"] in (2, 3)


@pytest.mark.parametrize("is_lora", [False, True])
def test_every_auto_is_filled_in(is_lora: bool) -> None:
    filled = filled_config(parsed(DEFAULT_CONFIG), is_lora=is_lora, wants_bf16=is_lora)
    assert filled["optimizer"]["params"]["lr"] == LEARNING_RATE[is_lora]
    assert filled["bf16"] == {"enabled": is_lora}
    del filled["gradient_pruning"]
    assert '"auto"' not in json.dumps(filled)


def test_numbers_of_the_file_stay() -> None:
    given: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 7,
        "train_batch_size": "auto",
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Lion", "params": {"lr": 3e-4, "betas": [0.9, 0.99]}},
    }
    filled = filled_config(given, is_lora=False, wants_bf16=False)
    added = {"gradient_accumulation_steps": 1, "zero_optimization": {"stage": 0}}
    del given["train_batch_size"]  # it follows from the others
    assert filled == given | added


def test_bf16_contradicts_a_file_that_says_no() -> None:
    with pytest.raises(ConfigError, match=r'bf16\.enabled must be true or "auto" with --bf16'):
        filled_config({"bf16": {"enabled": False}}, is_lora=False, wants_bf16=True)


def test_log_goes_into_the_run_folder(tmp_path: Path) -> None:
    flags = ["--model", "m", "--data", "d.txt", "--out", str(tmp_path / "run")]
    settings = read_tuning_settings(flags)
    assert settings.block.log_path == str(tmp_path / "run" / "log.jsonl")
    assert settings.ds_config["gradient_pruning"]["log_path"] == settings.block.log_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "a.txt"], "the following arguments are required: --model. See --help."),
        (["--model", "m.gguf", "--data", "a.txt"], "--model must be a GGUF file that exists"),
        (["--model", "/nowhere", "--data", "a.txt"], "--model must be a model folder or a hub na"),
        (["--model", "m", "--data", "a.txt", "--steps", "9"], "must be less than the run's 9 st"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(
    flags: list[str], words: str, tmp_path: Path, repo_root: Path
) -> None:
    script = [sys.executable, "launch/finetune.py", "--out", str(tmp_path / "run"), *flags]
    done = subprocess.run(script, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert words in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_absent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without accelerate it was a traceback of transformers."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"The Trainer needs accelerate.*\[finetune\]"):
        check_model(str(tmp_path), is_lora=False)
