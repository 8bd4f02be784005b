"""Nothing of a bed stays behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ds_gradprune.errors import GradPruneError
from tests.helpers.netbed import with_netns
from tools.netbed import Bed, square_wave
from tools.netbed import __main__ as command_line
from tools.netbed import bed as bed_module
from tools.netbed.folder import keepers_of, remove_leftovers, start_time

ROOT = Path(__file__).resolve().parents[2]


def traces(folder: Path, networks: set[str]) -> list[str]:
    """What is left of a bed: its folder, processes that name it or live in its networks."""
    found = [str(folder)] if folder.exists() else []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes()
            network = os.readlink(entry / "ns/net")
        except OSError:  # it has ended meanwhile, or is about to
            continue
        if os.fsencode(folder) in arguments or network in networks:
            found.append(f"{entry.name} {arguments!r}")
    return found


def machine() -> tuple[str, str]:
    """The machine's own interfaces and named namespaces."""
    show = [["ip", "-o", "link", "show"], ["ip", "netns", "list"]]
    links, names = (subprocess.run(words, capture_output=True, text=True).stdout for words in show)
    return links, names


def networks_of(folder: Path) -> set[str]:
    """The networks that the keepers of a folder hold."""
    held = [trace.split()[0] for trace in traces(folder, set())[1:]]
    return {os.readlink(f"/proc/{pid}/ns/net") for pid in held} - {os.readlink("/proc/self/ns/net")}


def wait_until_gone(folder: Path, networks: set[str]) -> list[str]:
    """Give the kernel a while; returns what is left then."""
    deadline_s = time.monotonic() + 20
    while (left := traces(folder, networks)) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return left


@with_netns
def test_close_leaves_nothing():
    before = machine()
    with Bed(hosts=2) as bed:
        networks = networks_of(bed.folder)
        assert len(networks) == 3  # two hosts and the switch
        sleeper = bed.hosts[1].popen(["sleep", "600"])
        player = bed.play(square_wave("2mbit", "1mbit", 7200.0))
        assert machine() == before  # not even while it lives
    assert traces(bed.folder, networks) == []
    assert sleeper.wait(20) != 0
    player.wait(0)
    bed.close()  # twice is fine


@with_netns
def test_a_failed_start_leaves_nothing(monkeypatch):
    monkeypatch.setattr(bed_module, "PREFIX", 99)
    before = set(Path(tempfile.gettempdir()).glob("netbed-*"))
    with pytest.raises(GradPruneError, match=r"command failed: ip address add 10.77.0.1/99"):
        Bed(hosts=2)
    assert set(Path(tempfile.gettempdir()).glob("netbed-*")) == before


OWNER = """
import os, sys, time
from tools.netbed import Bed
bed = Bed(hosts=2)
child = os.fork() if sys.argv[1] == "fork" else 0
if child == 0 and sys.argv[1] == "fork":
    time.sleep(600)
print(bed.folder, child, flush=True)
time.sleep(600)
"""


def start_owner(kind: str) -> tuple[subprocess.Popen[str], Path, int]:
    """A process that owns a bed; returns it, the bed's folder, and its child's number."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, kind], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    folder, child = owner.stdout.readline().split()
    owner.stdout.close()
    return owner, Path(folder), int(child)


@with_netns
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_bed_dies_with_its_owner(number):
    owner, folder, _ = start_owner("alone")
    networks = networks_of(folder)
    owner.send_signal(number)
    owner.wait(20)
    assert len(networks) == 3
    assert wait_until_gone(folder, networks) == []


@with_netns
def test_ending_owner_and_keepers_at_once_leaves_nothing():
    """As a supervisor does that ends a process with all its children."""
    owner, folder, _ = start_owner("alone")
    networks = networks_of(folder)
    for keeper in [*keepers_of(folder), owner.pid]:
        os.kill(keeper, signal.SIGTERM)
    owner.wait(20)
    assert wait_until_gone(folder, networks) == []


@with_netns
def test_the_next_bed_removes_what_a_dead_owner_left():
    """A child of the owner's holds the pipes open, so the keepers do not see that it is dead."""
    owner, folder, child = start_owner("fork")
    networks = networks_of(folder)
    try:
        owner.kill()
        owner.wait(20)
        assert len(traces(folder, networks)) >= 4
        with Bed(hosts=2) as bed:
            assert folder in bed.leftovers
            assert wait_until_gone(folder, networks) == []
    finally:
        os.kill(child, signal.SIGKILL)


@with_netns
def test_a_living_owner_keeps_its_bed(bed):
    assert remove_leftovers() == []
    assert bed.ssh(1, ["true"]).returncode == 0


@with_netns
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_line_closes_the_bed_when_interrupted(number):
    words = [sys.executable, "-m", "tools.netbed", "--", "sh", "-c", "echo up; sleep 600"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    pattern = f"netbed-{process.pid}-*"
    (folder,) = Path(tempfile.gettempdir()).glob(pattern)
    networks = networks_of(folder)
    process.send_signal(number)
    assert process.wait(30) == 130
    process.stdout.close()
    assert traces(folder, networks) == []


@with_netns
def test_command_line_returns_the_exit_code_and_tells_the_traffic(capfd):
    assert command_line.main(["--hosts", "3", "--rate", "1gbit", "--", "sh", "-c", "exit 7"]) == 7
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3
    assert '"host": "host-2", "sent_bytes": ' in said[2]


def test_start_time_tells_processes_apart():
    assert start_time(os.getpid()) == start_time(os.getpid()) is not None
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    assert start_time(ended.pid) is None
    ended.wait()
    assert start_time(ended.pid) is None
