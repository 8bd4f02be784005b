"""launch/supervise.py with `min_islands`: a lost rank alone is started again, the others go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.helpers import scripts
from tests.helpers.supervised import Supervised, parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

RANK = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(__file__).parent, os.environ["RANK"]
with (folder / f"lives.{rank}").open("a") as file:
    file.write("|".join([os.environ["MASTER_PORT"], *sys.argv[1:]]) + "\\n")
if rank == "0":
    (folder / "out").mkdir(exist_ok=True)
    with (folder / "out" / "log.jsonl").open("a") as file:
        file.write("{}\\n")
while not (folder / "out" / "log.jsonl").exists():
    time.sleep(0.02)
lives = len((folder / f"lives.{rank}").read_text().splitlines())
deed = (folder / "deed").read_text()
if rank == "1" and lives == 1 and deed == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if rank == "1" and lives == 2:
    (folder / "back").touch()
while not (folder / "back").exists():
    time.sleep(0.02)
sys.exit(7 if deed == "fail" else 0)
"""
"""The ranks end when the lost one has come back. The script is called as the one that may be so."""


def started(folder: Path, hosts: str, deed: str, *flags: str) -> Supervised:
    (folder / "deed").write_text(deed)
    (folder / "train.py").write_text(RANK)
    config = scripts.write_config(
        folder / "config.json", **scripts.block(prune="update", min_islands=2)
    )
    command = [str(folder / "train.py"), "--config", str(config), "--out", str(folder / "out")]
    return Supervised(folder, hosts, *flags, command=command, port=scripts.free_port())


def lives(folder: Path) -> list[list[str]]:
    return [(folder / f"lives.{rank}").read_text().splitlines() for rank in range(3)]


def test_a_lost_rank_alone_is_started_again(tmp_path: Path) -> None:
    run = started(tmp_path, "localhost slots=3", "die")
    code, told = run.end()
    assert code == 0, told
    first, lost, third = lives(tmp_path)
    assert (len(first), len(lost), len(third)) == (1, 2, 1)
    assert lost[0] == lost[1]  # the same command, at the same meeting point
    assert [event["local_rank"] for event in run.events("again")] == [1]
    assert len(run.events("started")) == 1


def test_a_lost_hosts_ranks_are_started_again_when_it_is_back(tmp_path: Path) -> None:
    hosts = "".join(f"host-{name} slots=1\n" for name in "abc")
    run = started(tmp_path, hosts, "stay", "--host-timeout", "3", "--rejoin", "1")
    pids = run.until(lambda: len(run.events("ranks")) == 3 and run.events("ranks"))
    run.until(lambda: (tmp_path / "lives.1").exists())
    lost = next(event for event in pids if event["host"] == "host-b")
    (tmp_path / "gone.host-b").touch()
    os.kill(parent(lost["pids"][0]), signal.SIGKILL)
    run.until(lambda: run.events("lost"))
    (tmp_path / "gone.host-b").unlink()
    code, told = run.end()
    assert code == 0, told
    assert [len(of_rank) for of_rank in lives(tmp_path)] == [1, 2, 1]
    assert [event["host"] for event in run.events("again")] == ["host-b"]


def test_with_too_few_left_all_start_anew(tmp_path: Path) -> None:
    """Two of three end by themselves: the last one cannot train on."""
    (tmp_path / "back").touch()
    run = started(tmp_path, "localhost slots=3", "fail", "--max-restarts", "2")
    code, told = run.end()
    assert code == 7, told
    assert "--max-restarts 2 is used up" in told
    assert len(run.events("started")) >= 2
