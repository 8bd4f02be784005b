"""Links and hosts of the bed: rates, outages, counters, names.

The only tests that look at the wall clock, because that is what a link is made of. The bound that
a shaper must not exceed is exact; what it must reach is half of its rate, for busy machines.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from ds_gradprune.errors import ConfigError
from tests.helpers.netbed import with_netns
from tools.netbed import Bed, Counters, Host, parse_rate, steps
from tools.netbed.rates import FRAME_BYTES, burst_bytes

SEND = """
import socket, sys, time
size, address = int(sys.argv[1]), (sys.argv[2], 5000)
link = socket.create_connection(address)
start_s = time.monotonic()
block = bytes(1 << 16)
while size > 0:
    size -= link.send(block[:size])
link.shutdown(socket.SHUT_WR)
link.recv(1)
print(time.monotonic() - start_s)
"""

RECEIVE = """
import socket
server = socket.create_server(("0.0.0.0", 5000))
print("listening", flush=True)
link, _ = server.accept()
while link.recv(1 << 20):
    pass
link.sendall(b"x")
link.recv(1)
"""

# Pulled cables: sends one line when told to, and tells after a while that no answer came.
ASK = """
import socket, sys
link = socket.create_connection((sys.argv[1], 5000), timeout=60)
print("connected", flush=True)
input()
link.settimeout(0.5)
link.sendall(b"ping")
link.shutdown(socket.SHUT_WR)
try:
    print(link.recv(1), flush=True)
except TimeoutError:
    print("silence", flush=True)
link.settimeout(60)
print("answered" if link.recv(1) == b"x" else "closed", flush=True)
"""


def start(host: Host, program: str, *arguments: str, **options) -> subprocess.Popen[str]:
    """Start a program on a host."""
    words = [sys.executable, "-I", "-u", "-c", program, *arguments]
    return host.popen(words, stdout=subprocess.PIPE, text=True, **options)


def finish(process: subprocess.Popen[str]) -> str:
    """What a program wrote until its end."""
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    return said


def transfer(bed: Bed, size: int, sender: int = 0) -> tuple[float, Counters]:
    """Send bytes from one host to the other; returns seconds and the sender's traffic."""
    source, sink = bed.hosts[sender], bed.hosts[1 - sender]
    before = source.counters()
    receiver = start(sink, RECEIVE)
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == "listening\n"
    elapsed_s = float(finish(start(source, SEND, str(size), sink.address)))
    finish(receiver)
    return elapsed_s, source.counters() - before


def fastest(bed: Bed, size: int, limit_s: float, sender: int = 0, tries: int = 20) -> float:
    """Seconds of the fastest of several transfers; stops at the first below the limit.

    What else the machine does makes a transfer slower, never faster: a link is as fast as its
    fastest transfer.
    """
    best_s = float("inf")
    for _ in range(tries):
        best_s = min(best_s, transfer(bed, size, sender)[0])
        if best_s < limit_s:
            break
    return best_s


def least_s(size: int, rate_bps: float) -> float:
    """A shaper that keeps its rate lets so many bytes of payload pass no earlier.

    Payload, because it is surely less than what crossed the link; less the bucket of each of the
    two shapers, which may be full at the beginning.
    """
    return 8 * (size - 2 * burst_bytes(rate_bps)) / rate_bps


@with_netns
@pytest.mark.parametrize(
    ("rate", "size"), [("20mbit", 1_000_000), ("100mbit", 4_000_000), ("1gbit", 40_000_000)]
)
def test_rate_is_kept(bed, rate, size):
    rate_bps = parse_rate(rate)
    bed.set_rate(rate)
    limit_s = 2 * 8 * size / rate_bps
    assert least_s(size, rate_bps) <= fastest(bed, size, limit_s) < limit_s


@with_netns
def test_an_unshaped_link_is_faster_than_any_shaped_one(bed):
    bed.set_rate("none")
    limit_s = least_s(40_000_000, 1e9)
    assert fastest(bed, 40_000_000, limit_s) < limit_s


@with_netns
@pytest.mark.parametrize(("host", "direction"), [(0, "send"), (1, "receive")])
def test_directions_are_shaped_apart(bed, host, direction):
    bed.set_rate("5mbit", host, direction)
    slow_s, _ = transfer(bed, 500_000, sender=0)
    assert slow_s >= least_s(500_000, 5e6)
    limit_s = least_s(500_000, 5e6) / 2  # a tenth of it, on a machine with nothing to do
    assert fastest(bed, 500_000, limit_s, sender=1) < limit_s


@with_netns
def test_rate_changes_during_a_transfer(bed):
    size = 2_000_000
    bed.set_rate("1mbit")
    with bed.play(steps([(0.1, "100mbit")])) as player:
        elapsed_s, crossed = transfer(bed, size)
        player.wait(60)
    assert [played.event.rate_bps for played in player.played] == [100e6]
    assert elapsed_s < least_s(size, 1e6) / 2  # 16 s if the rate had stayed
    assert crossed.sent_bytes > size


@with_netns
def test_a_connection_outlives_an_outage(bed):
    receiver = start(bed.hosts[1], RECEIVE)
    assert receiver.stdout is not None
    receiver.stdout.readline()
    asker = start(bed.hosts[0], ASK, bed.hosts[1].address, stdin=subprocess.PIPE)
    assert asker.stdin is not None
    assert asker.stdout is not None
    assert asker.stdout.readline() == "connected\n"
    bed.set_link(up=False, host=1)
    asker.stdin.write("go\n")
    asker.stdin.flush()
    assert asker.stdout.readline() == "silence\n"
    bed.set_link(up=True, host=1)
    assert finish(asker) == "answered\n"
    finish(receiver)


@with_netns
def test_counters_hold_payload_and_headers_of_every_segment(bed):
    size = 2_000_000
    other = bed.hosts[1].counters()
    _, crossed = transfer(bed, size)
    other = bed.hosts[1].counters() - other
    # A TCP segment holds 1448 to 1460 bytes of payload. Headers: ARP 42; Ethernet 14, IP 20, TCP 20
    # to 60. A few frames without payload: handshake, acknowledgements, end.
    assert size / 1460 < crossed.sent_frames < 1.1 * size / 1448 + 20
    assert size + 42 * crossed.sent_frames < crossed.sent_bytes < size + 94 * crossed.sent_frames
    assert 0 < crossed.received_bytes < size / 10  # acknowledgements
    # Whatever one host sends the other receives; the last frames may be on their way.
    assert abs(crossed.sent_frames - other.received_frames) < 10
    assert abs(crossed.sent_bytes - other.received_bytes) < 10 * FRAME_BYTES


@with_netns
def test_changing_the_rate_keeps_the_counters(bed):
    before = bed.hosts[0].counters()
    for rate in ("20mbit", "none", "1gbit"):
        bed.set_rate(rate)
    after = bed.hosts[0].counters() - before
    assert (after.sent_bytes, after.received_bytes) == (0, 0)


# ---- hosts ---------------------------------------------------------------------------------


@with_netns
def test_hosts_have_names_addresses_and_processes_of_their_own(bed):
    said = bed.ssh(
        1,
        ["hostname; hostname -I; ls -d /proc/[0-9]*; ls /dev/shm /sys/class/net"],
        capture_output=True,
        text=True,
    ).stdout.split()
    assert said[:2] == ["host-1", bed.hosts[1].address]
    assert len([word for word in said if word.startswith("/proc/")]) < 12
    assert [word for word in said[2:] if not word.startswith("/proc/")] == [
        "/dev/shm:",
        "/sys/class/net:",
        "eth0",
        "lo",
    ]
    assert bed.hostfile.read_text() == "host-0 slots=1\nhost-1 slots=1\n"


@with_netns
def test_ssh_knows_nothing_but_the_bed(bed):
    """Neither a key nor a list of hosts of the user is read or written."""
    private = Path(pwd.getpwuid(os.geteuid()).pw_dir) / ".ssh"
    before = sorted(private.iterdir()) if private.is_dir() else None
    said = bed.hosts[0].run(["ssh", "-G", "host-1"], capture_output=True, text=True).stdout
    facts = dict(line.split(" ", 1) for line in said.splitlines() if " " in line)
    assert facts["identityfile"] == str(bed.folder / "user_key")
    assert facts["userknownhostsfile"] == str(bed.folder / "known_hosts")
    assert facts["stricthostkeychecking"] in ("true", "yes")
    assert (sorted(private.iterdir()) if private.is_dir() else None) == before


@with_netns
def test_environment_reaches_the_launcher(bed, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    environ = bed.environ(NOTE="a note")
    lines = Path(environ["DS_ENV_FILE"]).read_text().splitlines()
    assert {"GLOO_SOCKET_IFNAME=eth0", "DS_ACCELERATOR=cpu", "NOTE=a note"} <= set(lines)
    said = bed.hosts[0].run(["sh", "-c", "cat $NETBED_HOSTFILE"], env=environ, capture_output=True)
    assert said.stdout.decode() == bed.hostfile.read_text()


@with_netns
def test_unknown_host_or_direction_is_refused(bed):
    with pytest.raises(ConfigError, match=r"host must be 0 to 1, got 2"):
        bed.set_rate("20mbit", host=2)
    with pytest.raises(ConfigError, match=r"direction must be one of .*, got 'up'"):
        bed.set_rate("20mbit", direction="up")


@with_netns
def test_beds_side_by_side_do_not_meet(bed):
    before = bed.hosts[1].counters()
    with Bed(hosts=3) as other:
        receiver = start(other.hosts[1], RECEIVE)
        assert receiver.stdout is not None
        receiver.stdout.readline()
        # The same address, another network: nobody listens here.
        refused = bed.hosts[0].run(
            [sys.executable, "-I", "-c", SEND, "1", other.hosts[1].address],
            capture_output=True,
            text=True,
        )
        assert "ConnectionRefusedError" in refused.stderr
        finish(start(other.hosts[2], SEND, "1000000", other.hosts[1].address))
        finish(receiver)
        assert other.ssh(2, ["hostname"], capture_output=True, text=True).stdout == "host-2\n"
    assert (bed.hosts[1].counters() - before).received_bytes < 10_000
    assert bed.ssh(1, ["true"]).returncode == 0
