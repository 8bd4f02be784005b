"""launch/train.py: flags, faults, one process, two ranks, interruption and resume."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import transformers

from ds_gradprune.config import load_block
from ds_gradprune.errors import ConfigError
from launch.support import start
from textgen.model import load_model
from launch.support.peers import Peers, Place
from launch import train
from tests.helpers import scripts

# DeepSpeed and the libraries it imports warn of their own use of torch.
pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("default")]

RESULT_KEYS = {
    "steps",
    "val_loss",
    "val_loss_start",
    "wire_bytes",
    "dense_bytes",
    "density_min",
    "density_max",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.txt, model/ and config.json."""
    folder = tmp_path_factory.mktemp("inputs")
    text = scripts.write_text(folder / "text.txt")
    scripts.write_model(folder / "model", text)
    scripts.write_config(folder / "config.json")
    return folder


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


def arguments(here: Path, out: Path, **changes: str | None) -> list[str]:
    flags: dict[str, str | None] = {
        "--config": str(here / "config.json"),
        "--model": str(here / "model"),
        "--text": str(here / "text.txt"),
        "--steps": "12",
        "--out": str(out),
    }
    flags |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return [part for pair in flags.items() if pair[1] is not None for part in pair if part]


# --- flags and faults -----------------------------------------------------------------------------


def test_flags_are_frozen() -> None:
    flags = [option for action in train.parser()._actions for option in action.option_strings]
    assert flags == [
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
    ]
    assert len(flags) - 2 <= 10


def block(**changes: Any) -> dict[str, Any]:
    return {"gradient_pruning": scripts.CONFIG["gradient_pruning"] | changes}


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
    "no config": (lambda h, t: ["--steps", "3"], "the following arguments are required: --config"),
    "bad flag": (
        lambda h, t: arguments(h, t / "out", steps="0"),
        "--steps: must be a whole number",
    ),
    "unknown flag": (lambda h, t: [*arguments(h, t / "out"), "--lr", "1"], "unrecognized"),
    "absent config": (lambda h, t: arguments(h, t, config=str(t / "no")), "must be readable, got"),
    "no JSON": (lambda h, t: raw_config(h, t, "{"), "--config must be JSON, got"),
    "no object": (lambda h, t: raw_config(h, t, "[1]"), "--config must hold a JSON object"),
    "key twice": (lambda h, t: raw_config(h, t, '{"a": 1, "a": 2}'), "the key a is there twice"),
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
    "stage 3": (
        lambda h, t: bad_config(h, t, zero_optimization={"stage": 3}),
        "zero_optimization.stage must be at most 2",
    ),
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


# --- the shared-memory op -------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["c++", "ninja"])
def test_without_a_compiler_deepspeed_trains_without_its_op(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    real = shutil.which
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setattr(start.shutil, "which", lambda tool: None if tool == missing else real(tool))
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {"deepspeed_shm_comm": True})
    said: list[str] = []
    start.prepare_shm_op(Peers(Place()), said.append)
    assert said == [f"DeepSpeed trains without its shared-memory op: {missing} is not installed"]
    assert deepspeed.ops.__compatible_ops__ == {"deepspeed_shm_comm": False}


def test_first_compilation_is_announced_and_its_failure_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed
    from deepspeed.ops.op_builder.builder import OpBuilder

    def fail(self: OpBuilder, verbose: bool = True) -> None:
        raise RuntimeError("Error building extension\nmany lines")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(OpBuilder, "load", fail)
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {"deepspeed_shm_comm": True})
    said: list[str] = []
    start.prepare_shm_op(Peers(Place()), said.append)
    assert said == [
        "DeepSpeed compiles its shared-memory op once, about a minute ...",
        "DeepSpeed trains without its shared-memory op: Error building extension",
    ]
    assert deepspeed.ops.__compatible_ops__ == {"deepspeed_shm_comm": False}


def test_lock_of_a_killed_compilation_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {"deepspeed_shm_comm": True})
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    said: list[str] = []
    start.prepare_shm_op(Peers(Place()), said.append)
    assert said == [
        "DeepSpeed trains without its shared-memory op: an earlier compilation was killed; "
        f"delete {lock}"
    ]


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
    assert f"The checkpoint in {out / 'checkpoints'} must be readable" in told
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


# --- two ranks ------------------------------------------------------------------------------------

STEPS = 24


@pytest.fixture(scope="module")
def unbroken(here: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run over two ranks through DeepSpeed's launcher, and what it showed."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    launcher = Path(sys.executable).parent / "deepspeed"
    done = subprocess.run(
        [
            str(launcher),
            "--num_accelerators",
            "2",
            "--master_port",
            scripts.free_port(),
            "launch/train.py",
            *arguments(here, out, steps=str(STEPS), eval_every="10", save_every="5"),
        ],
        cwd=scripts.ROOT,
        env=scripts.script_environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_train_over_pruned_gradients(unbroken: tuple[Path, str], here: Path) -> None:
    out, shown = unbroken
    result = json.loads((out / "result.json").read_text())
    assert result["val_loss"] < result["val_loss_start"] - 0.3
    assert [step for step, _ in result["val_losses"]] == [0, 10, 20, STEPS]
    assert 0 < result["wire_bytes"] < result["dense_bytes"]
    log = scripts.log_of(out)
    assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    assert log[0]["density"] == 1.0
    assert result["density_min"] == result["density_max"] == log[-1]["density"] < 0.11
    assert log[0]["decision"]["reason"]
    assert f"step {STEPS}/{STEPS}  loss " in shown
    assert all(field in shown for field in ("  P ", "  density ", "  sent ", "  time "))
    assert shown.count(f"step {STEPS}/{STEPS}") == 1  # one rank speaks
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["latest", "step00000020", "step00000024"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_trained_folder_is_a_plain_transformers_folder(unbroken: tuple[Path, str]) -> None:
    model = str(unbroken[0] / "model")
    assert load_model(model).num_parameters() > 0
    generate = transformers.pipeline("text-generation", model=model)
    [reply] = generate("the fox", max_new_tokens=5, do_sample=False)
    assert reply["generated_text"].startswith("the fox")
    assert len(reply["generated_text"]) > len("the fox")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_resolved_config_is_complete_and_valid(unbroken: tuple[Path, str]) -> None:
    out, _ = unbroken
    config = json.loads((out / "config.json").read_text())
    assert config["train_batch_size"] == 8
    resolved = load_block(config)
    assert config["gradient_pruning"] == resolved.model_dump(mode="json")
    assert resolved.log_path == str(out / "log.jsonl")
    with pytest.raises(ConfigError, match="must be less than the run's 4 steps"):
        load_block(config, total_steps=4)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_interrupted_killed_and_resumed_run_equals_the_unbroken_one(
    unbroken: tuple[Path, str], here: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = arguments(here, out, steps=str(STEPS), eval_every="10", save_every="5")
    # One rank alone is asked to stop: both end at the same step, with a checkpoint.
    ranks = scripts.start_ranks(given)
    scripts.wait_for_step(out / "log.jsonl", 7, ranks)
    ranks[1].send_signal(signal.SIGINT)
    told = scripts.finish(ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], told
    assert "continue with --resume" in told[0]
    assert "Traceback" not in told[0] + told[1]
    stopped = json.loads((out / "result.json").read_text())
    assert stopped["stopped"]
    assert 7 <= stopped["steps"] < STEPS
    # Both are killed some steps after a checkpoint: the log is ahead of what was saved.
    ranks = scripts.start_ranks([*given, "--resume"])
    scripts.wait_for_step(out / "log.jsonl", 17, ranks)
    for rank in ranks:
        rank.kill()
    scripts.finish(ranks)
    ranks = scripts.start_ranks([*given, "--resume"])
    told = scripts.finish(ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], told
    whole, _ = unbroken
    losses, wanted = ([entry["loss"] for entry in scripts.log_of(run)] for run in (out, whole))
    assert losses == wanted
    for name in ("model/model.safetensors", "data/tokens.bin"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    first, second = (json.loads((run / "result.json").read_text()) for run in (out, whole))
    for key in RESULT_KEYS - {"wire_bytes", "dense_bytes"} | {"val_losses"}:
        assert first[key] == second[key], key


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_islands_train_and_resume_in_the_middle_of_an_interval(here: Path, tmp_path: Path) -> None:
    changes = block(prune="update", sync_every=3)
    config = str(scripts.write_config(tmp_path / "config.json", **changes))

    def train_to(out: Path, steps: int, *flags: str) -> dict[str, Any]:
        given = arguments(here, out, config=config, steps=str(steps), eval_every="10")
        ranks = scripts.start_ranks([*given, *flags])
        told = scripts.finish(ranks)
        assert [rank.returncode for rank in ranks] == [0, 0], told
        result: dict[str, Any] = json.loads((out / "result.json").read_text())
        return result

    whole = train_to(tmp_path / "whole", 18)
    assert whole["val_loss"] < whole["val_loss_start"] - 0.3
    assert [entry["step"] for entry in scripts.log_of(tmp_path / "whole")] == [
        1,
        2,
        3,
        6,
        9,
        12,
        15,
        18,
    ]
    assert whole["density_min"] == whole["density_max"] < 0.11
    train_to(tmp_path / "parts", 11)
    parts = train_to(tmp_path / "parts", 18, "--resume")
    assert [entry for entry in parts["val_losses"] if entry[0] != 11] == whole["val_losses"]
    name = "model/model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    losses, wanted = (
        [entry["loss"] for entry in scripts.log_of(tmp_path / run)] for run in ("parts", "whole")
    )
    assert losses == wanted


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fault_on_two_ranks_is_told_once(here: Path, tmp_path: Path) -> None:
    given = arguments(here, tmp_path / "out", model="./absent")
    ranks = scripts.start_ranks(given)
    told = scripts.finish(ranks)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "".join(told).count("error: ") == 1
    assert "Traceback" not in "".join(told)
    assert not (tmp_path / "out").exists()
