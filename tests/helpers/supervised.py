"""A supervisor at work on ranks that do as a plan says, and hosts that are all this one."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers import scripts

RANK = """
import os, pathlib, signal, sys, time
folder, plan = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
turn = int(os.environ["MASTER_PORT"]) - int(sys.argv[3])
resumes = "--resume" in sys.argv
place = [world, os.environ["LOCAL_SIZE"], os.environ["MASTER_PORT"], resumes]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
(folder / f"{rank}.{turn}").write_text(" ".join(map(str, place)))
deed = plan[min(turn, len(plan) - 1)]
if deed == "save":  # what training does on SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    time.sleep(60)
elif deed.startswith("wait"):
    time.sleep(60)
elif deed.startswith("die") and rank == deed[3:]:
    os.kill(os.getpid(), signal.SIGKILL)
elif deed.startswith("die"):
    time.sleep(60)
else:
    sys.exit(int(deed))
"""
"""A rank that writes down where it was started, and does the deed of its turn."""

SSH = """#!/bin/sh
# Every host is this one, unless a file says that it is gone.
name=$1; shift
[ -e {folder}/gone.$name ] && exit 255
echo $$ > {folder}/line.$name
cat | sh -c "$*" | cat
"""


class Supervised:
    """A supervisor at work, in a folder of its own."""

    def __init__(
        self, folder: Path, hosts: str, *flags: str, command: list[str], port: str
    ) -> None:
        self.folder = folder
        self.log = folder / "log.jsonl"
        (folder / "hosts").write_text(hosts)
        ssh = folder / "ssh"
        ssh.write_text(SSH.format(folder=folder))
        ssh.chmod(0o755)
        words = ["--hostfile", str(folder / "hosts"), "--grace", "1", "--log", str(self.log)]
        if "localhost" not in hosts:
            words += ["--ssh", str(ssh)]
        words += ["--master_port", port, *flags, "--", *command]
        self.process = subprocess.Popen(
            [sys.executable, "launch/supervise.py", *words],
            cwd=scripts.ROOT,
            env=scripts.script_environ(),
            stderr=subprocess.PIPE,
            text=True,
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        return [entry for entry in map(json.loads, lines) if entry["event"] == name]

    def until(self, holds: Callable[[], Any]) -> Any:
        """Return when something holds, or the supervisor has ended."""
        while not (found := holds()) and self.process.poll() is None:
            time.sleep(0.02)
        return found

    def end(self, limit_s: float = 40.0) -> tuple[int, str]:
        """Its exit code, and what was told."""
        try:
            told = self.process.communicate(timeout=limit_s)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        return self.process.returncode, told

    def places(self) -> dict[str, str]:
        """What every rank has found in every turn."""
        return {
            path.name: path.read_text()
            for path in sorted(self.folder.iterdir())
            if path.name[0].isdigit()
        }


def supervised(folder: Path, hosts: str, plan: str, *flags: str) -> Supervised:
    script = folder / "rank.py"
    script.write_text(RANK)
    port = scripts.free_port()
    command = [str(script), str(folder), plan, port]
    return Supervised(folder, hosts, *flags, command=command, port=port)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if parent(int(folder.name)) == pid:
                    found.append(int(folder.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
