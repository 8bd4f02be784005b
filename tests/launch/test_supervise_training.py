"""Training under launch/supervise.py: what it goes on from, and that it ends where it should."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from ds_gradprune.errors import ConfigError, DataError
from launch.supervise import command_words, read_task
from launch.support.whole import candidates, fault_of, name_latest
from tests.helpers import scripts
from tests.helpers.scripts import arguments, block, log_of
from tests.helpers.supervised import Supervised, parent

# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoint(folder: Path, tag: str) -> Path:
    (folder / tag).mkdir(parents=True)
    torch.save({"w": torch.arange(1000.0)}, folder / tag / "mp_rank_00_model_states.pt")
    name_latest(folder, tag)
    return folder / tag / "mp_rank_00_model_states.pt"


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found(tmp_path: Path) -> None:
    """torch.load reads such a file without a word."""
    path = checkpoint(tmp_path, "step00000001")
    assert fault_of(path.parent) is None
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    torch.load(path)
    assert "is damaged: the checksum of" in str(fault_of(path.parent))
    path.write_bytes(whole[:-100])
    assert "is damaged" in str(fault_of(path.parent))


def test_candidates_are_the_newest_and_those_before_it(tmp_path: Path) -> None:
    assert list(candidates(tmp_path / "absent")) == []
    for step in (1, 3, 2, 4):
        checkpoint(tmp_path, f"step0000000{step}")
    (tmp_path / "best").mkdir()
    name_latest(tmp_path, "step00000003")
    assert list(candidates(tmp_path)) == ["step00000003", "step00000002", "step00000001"]
    with pytest.raises(DataError, match="must be writable"):
        name_latest(tmp_path / "latest", "step1")


# ---- the command ---------------------------------------------------------------------------------


def test_commands_become_those_of_a_rank(tmp_path: Path) -> None:
    assert command_words(["deepspeed", "x.py", "--a"]) == [sys.executable, "x.py", "--a"]
    assert command_words(["python3", "x.py"]) == ["python3", "x.py"]
    installed = command_words(["ds-gradprune", "train", "--out", "o"])
    assert installed == [sys.executable, "-m", "ds_gradprune", "train", "--out", "o"]
    with pytest.raises(ConfigError, match=r"got deepspeed's own --hostfile\. Leave out"):
        command_words(["deepspeed", "--hostfile", "h", "x.py"])
    with pytest.raises(ConfigError, match="a command must follow --"):
        command_words(["deepspeed"])
    hosts = tmp_path / "hosts"
    hosts.write_text("host-a slots=2\n")
    own = ["--hostfile", str(hosts)]
    with pytest.raises(ConfigError, match="--out must be in the command"):
        read_task([*own, "--", "launch/train.py"])
    with pytest.raises(ConfigError, match="--min-hosts must be at most the 1 hosts"):
        read_task([*own, "--min-hosts", "2", "--", "x.py"])
    assert read_task([*own, "--", "ds-gradprune", "train", "--out", "o"]).folder is not None
    assert read_task([*own, "--", "my/loop.py", "--out", "o"]).folder is None
    task = read_task([*own, "--", "launch/train.py", "--out=runs/a"])
    assert (task.checkpoints, task.log) == (
        Path("runs/a/checkpoints"),
        Path("runs/a.supervise.jsonl"),
    )


STEPS = 240
"""The first save is after 20: what is killed then is far from its end."""


# ---- training ------------------------------------------------------------------------------------


def trained(tmp_path: Path, here: Path, hosts: str, *flags: str) -> tuple[Supervised, Path]:
    """A run of two islands under a supervisor, with some checkpoints behind it."""
    config = scripts.write_config(
        tmp_path / "config.json", **block(prune="update", throttle=None, timeout_s=20.0)
    )
    out = tmp_path / "out"
    given = arguments(
        here, out, config=str(config), steps=str(STEPS), eval_every="500", save_every="20"
    )
    command = ["launch/train.py", *given]
    run = Supervised(tmp_path, hosts, *flags, command=command, port=scripts.free_port())
    run.until(lambda: (out / "checkpoints" / "latest").is_file())
    return run, out


def finished(run: Supervised, out: Path) -> str:
    code, told = run.end(limit_s=150.0)
    assert code == 0, told
    assert json.loads((out / "result.json").read_text())["steps"] == STEPS
    assert [entry["step"] for entry in log_of(out)] == list(range(1, STEPS + 1))
    assert "resumed after step" in told
    return told


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_training_goes_on_after_a_killed_island(tmp_path: Path, here: Path) -> None:
    run, out = trained(tmp_path, here, "localhost slots=2")
    os.kill(run.events("ranks")[0]["pids"][1], signal.SIGKILL)
    finished(run, out)
    assert [event["hosts"] for event in run.events("started")] == [["localhost"]] * 2
    assert "--resume" in run.events("started")[1]["words"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_training_goes_on_without_a_host_that_is_gone_for_good(tmp_path: Path, here: Path) -> None:
    """The first host, which held rank 0, its store and its log."""
    hosts = [f"127.0.0.{number}" for number in (1, 2, 3)]
    run, out = trained(tmp_path, here, "".join(f"{host} slots=1\n" for host in hosts))
    (tmp_path / f"gone.{hosts[0]}").touch()
    [lost] = [event["pids"][0] for event in run.events("ranks") if event["host"] == hosts[0]]
    os.kill(parent(lost), signal.SIGKILL)
    told = finished(run, out)
    assert "note: 3 ranks have trained so far, now 2" in told
    assert run.events("started")[-1]["hosts"] == hosts[1:]
