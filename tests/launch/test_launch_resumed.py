"""--resume where hosts have disks of their own: the newest checkpoint that all have, or a fault."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_gradprune.errors import CheckpointError
from launch.support.resumed import common_tag, resumed_tag
from launch.support.run_folder import RunFolder
from tests.helpers import scripts
from tests.helpers.scripts import arguments, block, log_of

BOTH = ["step00000010", "step00000020"]
OLD, NEW = BOTH


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([(NEW, BOTH), (NEW, BOTH)], (NEW, False)),
        ([(NEW, BOTH), (None, BOTH)], (NEW, False)),
        ([(None, BOTH), (NEW, BOTH)], (NEW, False)),
        ([(NEW, BOTH), (OLD, BOTH)], (NEW, True)),  # ended between two hosts' names
        ([(OLD, BOTH), (NEW, BOTH)], (NEW, True)),
        ([(NEW, BOTH), (OLD, [OLD])], (OLD, True)),  # a disk of yesterday
        ([(NEW, BOTH), (NEW, [OLD])], (OLD, True)),
        ([(NEW, BOTH), ("../x", BOTH)], (NEW, True)),
        ([(OLD, BOTH), (OLD, BOTH)], (OLD, False)),  # a newer one was begun and not named
        ([(OLD, BOTH), (OLD, [NEW])], (None, True)),
        ([(NEW, BOTH), (None, [])], (None, True)),
        ([(NEW, [NEW]), (OLD, [OLD])], (None, True)),
        ([("absent", BOTH), ("absent", BOTH)], ("absent", False)),  # who loads it tells
        ([("a", BOTH), ("b", BOTH)], (None, True)),
    ],
)
def test_the_newest_that_all_have(told: Any, expected: tuple[str | None, bool]) -> None:
    assert common_tag(told) == expected


def peers_like(*others: list[Any]) -> Any:
    return SimpleNamespace(host="host-a", is_first=True, gather=lambda mine: [mine, *others])


def test_no_checkpoint_on_any_host_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--resume must find a checkpoint, but .* has none"):
        resumed_tag(peers_like(["host-b", None, []]), RunFolder(tmp_path))


def test_a_disk_that_was_lost_is_told_on_all(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for tag in BOTH:
        (folder.checkpoints / tag).mkdir(parents=True)
    folder.name_newest(NEW)
    message = (
        r"that every host has, but host-a has step00000010, step00000020; host-b has none\. Start"
    )
    with pytest.raises(CheckpointError, match=message):
        resumed_tag(peers_like(["host-b", None, []]), folder)
    assert resumed_tag(peers_like(["host-b", NEW, BOTH]), folder) == NEW


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(150)
def test_hosts_with_disks_of_their_own_go_on_from_what_all_have(here: Path, tmp_path: Path) -> None:
    """Each rank has a folder of its own for a disk. `latest` differed, and no run could go on."""
    disks = [tmp_path / name for name in ("a", "b")]
    ours = block(prune="update", throttle=None, timeout_s=20.0)
    config = str(scripts.write_config(tmp_path / "config.json", **ours))

    def train(steps: int, *more: str) -> list[str]:
        given = arguments(here, Path("out"), config=config, steps=str(steps), save_every="4")
        port, ranks = scripts.free_port(), []
        for rank, disk in enumerate(disks):
            disk.mkdir(exist_ok=True)
            place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
            words = [sys.executable, str(scripts.ROOT / "launch" / "train.py"), *given, *more]
            environ = scripts.script_environ() | place
            piped: dict[str, Any] = {
                "stdout": subprocess.DEVNULL,
                "stderr": subprocess.PIPE,
                "text": True,
            }
            ranks.append(subprocess.Popen(words, cwd=disk, env=environ, **piped))
        told = scripts.finish(ranks)
        assert [rank.returncode for rank in ranks] == [0, 0], told
        return told

    train(8)
    checkpoints = disks[1] / "out" / "checkpoints"
    shutil.rmtree(checkpoints / "step00000008")
    (checkpoints / "latest").write_text("step00000004")
    told = train(9, "--resume")
    assert "note: the run goes on from step00000004, the newest that every host has" in told[0]
    assert "resumed after step 4" in told[0]
    assert [entry["step"] for entry in log_of(disks[0] / "out")] == list(range(1, 10))
    assert [(disk / "out/checkpoints/latest").read_text() for disk in disks] == ["step00000009"] * 2
