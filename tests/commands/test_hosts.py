"""Agents: what they answer, how they are started, and what is told when they cannot."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import threading
from pathlib import Path

import pytest

from ds_gradprune.commands import agent, hosts, traffic
from ds_gradprune.commands.hostfile import HostLine, read_hostfile
from ds_gradprune.commands.hosts import Agent, Hosts
from ds_gradprune.errors import ConfigError, TransportError, TransportTimeout

HERE = HostLine("localhost")


# --- the hostfile ---------------------------------------------------------------------------------


def test_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two of them\nhost-a slots=2\n\nhost-b   slots = 2  # slow\n")
    assert read_hostfile(path) == [HostLine("host-a", 2), HostLine("host-b", 2)]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "must name at least one host"),
        ("host-a\n", r'line 1 must read "NAME slots=N"'),
        ("host-a slots=0\n", r'line 1 must read "NAME slots=N"'),
        ("host-a slots=1\nhost-a slots=1\n", "line 2 must name a new host"),
        ("host-a slots=1\nhost-b slots=2\n", "equally many slots"),
        ("host-a slots=" + "9" * 5000, 'line 1 must read "NAME slots=N"'),
        ("x" * 300 + " slots=1", 'line 1 must read "NAME slots=N"'),
    ],
)
def test_faulty_hostfile(text: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError, match=fault):
        read_hostfile(path)


def test_hostfile_that_is_no_text(tmp_path: Path) -> None:
    """It was a UnicodeDecodeError."""
    (tmp_path / "hosts").write_bytes(b"host-a slots=1\n\xff\xfe")
    with pytest.raises(ConfigError, match="--hostfile must be a text file in UTF-8, got"):
        read_hostfile(tmp_path / "hosts")


def test_absent_hostfile(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--hostfile must be readable"):
        read_hostfile(tmp_path / "hosts")


# --- the start ------------------------------------------------------------------------------------


def test_own_names_are_known() -> None:
    assert hosts.is_here("localhost")
    assert hosts.is_here("127.0.0.1")
    assert not hosts.is_here("192.0.2.1")
    assert not hosts.is_here("no-such-host.invalid")


def test_other_hosts_are_reached_over_ssh() -> None:
    environ = {"GLOO_SOCKET_IFNAME": "eth 0", "SECRET": "x", "DS_ENV_FILE": "/nowhere"}
    words = hosts.command(HostLine("192.0.2.1"), environ, "/a folder")
    assert words[: len(hosts.SSH) + 1] == [*hosts.SSH, "192.0.2.1"]
    assert words[-1].startswith("cd '/a folder' && exec env 'GLOO_SOCKET_IFNAME=eth 0' ")
    assert "SECRET" not in words[-1]


def test_the_environment_file_of_the_launcher_counts(tmp_path: Path) -> None:
    path = tmp_path / "environment"
    path.write_text("OMP_NUM_THREADS=3\nGLOO_SOCKET_IFNAME=eth1\n")
    found = hosts.exports({"OMP_NUM_THREADS": "8", "DS_ENV_FILE": str(path)})
    assert found == {"OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "eth1"}


def test_an_agent_answers() -> None:
    with Hosts([HERE], os.environ) as found:
        (facts,) = found.facts
        assert facts["host"] == socket.gethostname()
        assert facts["versions"]["ds_gradprune"]
        with pytest.raises(TransportError, match="localhost: 'dance' is not an order"):
            found.agents[0].ask("dance")


def test_a_host_without_an_agent_is_named() -> None:
    code = "import sys; print('cd: no such folder', file=sys.stderr); sys.exit(3)"
    lost = Agent(HostLine("host-b"), [sys.executable, "-c", code])
    with pytest.raises(TransportError, match="no agent on host-b: cd: no such folder"):
        lost.ask("facts")
    lost.close()


def test_a_command_that_is_not_there_is_named() -> None:
    with pytest.raises(TransportError, match="no-such-ssh cannot be run"):
        Agent(HostLine("host-b"), ["no-such-ssh"])


def test_login_scripts_may_talk_and_time_runs_out() -> None:
    code = (
        "import sys\nprint('Welcome!', flush=True)\nsys.stdin.readline()\n"
        'print(\'{"agent": 1, "id": 1, "result": 5}\', flush=True)\nsys.stdin.read()'
    )
    slow = Agent(HostLine("host-b"), [sys.executable, "-c", code])
    assert slow.ask("facts") == 5
    number = slow.order("facts")
    with pytest.raises(TransportTimeout, match=r"host-b has not answered within 0\.01 s"):
        slow.answer(number, 0.01)
    slow.close()


# --- orders ---------------------------------------------------------------------------------------


def answers_of(*orders: dict[str, object]) -> list[dict[str, object]]:
    text = "".join(json.dumps({"id": n} | order) + "\n" for n, order in enumerate(orders))
    out = io.BytesIO()
    agent.serve(io.BytesIO(text.encode()), out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_faults_are_answers() -> None:
    refused = {"do": "connect", "host": "127.0.0.1", "port": 1, "count": 1}
    first, second = answers_of(refused, {"do": "free_port"})
    assert "refused" in str(first["fault"])
    assert isinstance(second["result"], int)


def test_addresses_of_interfaces() -> None:
    assert agent.address_of("lo") == "127.0.0.1"
    assert agent.address_of("no-such-card") is None
    assert agent.address_of("") is None


# --- latency and rate -----------------------------------------------------------------------------


def ends(count: int = 1) -> tuple[list[socket.socket], list[socket.socket]]:
    """Both ends of so many connections."""
    with traffic.listen() as server:
        port = server.getsockname()[1]
        here = traffic.connect("localhost", port, count, 5.0)
        return here, traffic.accept(server, count, 5.0)


def test_latency() -> None:
    here, there = ends()
    answering = threading.Thread(target=traffic.pong, args=(there[0], 3))
    answering.start()
    ticks = iter(range(100))
    assert traffic.ping(here[0], 3, lambda: 0.25 * next(ticks)) == 0.125
    answering.join()
    traffic.close([*here, *there])


def test_a_peer_that_leaves_is_told() -> None:
    here, there = ends()
    traffic.close(there)
    with pytest.raises(OSError, match=r"closed|reset|Broken pipe"):
        traffic.ping(here[0], 3)
    traffic.close(here)


@pytest.mark.parametrize("both", [False, True])
def test_bytes_flow_and_both_ends_return(both: bool) -> None:
    here, there = ends(2)
    found: list[float | None] = []
    other = threading.Thread(
        target=lambda: found.append(traffic.flow(there, 0.05, sends=both, receives=True))
    )
    other.start()
    mine = traffic.flow(here, 0.05, sends=True, receives=both)
    other.join()
    assert found[0]
    assert (mine is not None) == both


def test_a_meter_counts_inside_its_window() -> None:
    now = [0.0]
    meter = traffic.Meter(traffic.Window(1.0, 3.0), lambda: now[0])
    for second, wanted in ((10.0, True), (10.5, True), (11.0, True), (12.9, True), (13.1, False)):
        now[0] = second
        assert meter.note(1_000_000) is wanted
    assert meter.mbit == 8.0
