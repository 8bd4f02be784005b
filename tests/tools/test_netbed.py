"""The bed of hosts behind shaped links: rates, outages, counters, and that nothing stays behind.

The only tests that look at the wall clock, because that is what a link is made of. The bound that
a shaper must not exceed is exact; what it must reach is half of its rate, for busy machines.
"""

from __future__ import annotations

import itertools
import os
import pwd
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.netbed import (
    Bed,
    Counters,
    Event,
    Host,
    merge,
    outages,
    parse_rate,
    random_walk,
    requirements,
    square_wave,
    steps,
)
from tools.netbed import __main__ as command_line
from tools.netbed import bed as bed_module
from tools.netbed.folder import keepers_of, remove_leftovers, start_time
from tools.netbed.rates import FRAME_BYTES, burst_bytes
from tools.netbed.schedule import Player, parse_schedule
from ds_gradprune.errors import ConfigError, GradPruneError, MissingDependencyError

ROOT = Path(__file__).resolve().parents[2]

ABSENT = requirements.missing()
netns = [pytest.mark.netns, pytest.mark.skipif(ABSENT is not None, reason=ABSENT or "")]


def with_netns(test):
    for mark in netns:
        test = mark(test)
    return test


# ---- rates and schedules: pure --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rate_bps"),
    [
        ("20mbit", 20e6),
        ("1gbit", 1e9),
        ("512kbit", 512e3),
        ("2.5mbit", 2.5e6),
        (3e6, 3e6),
        ("none", None),
        (None, None),
    ],
)
def test_rate_is_parsed(text, rate_bps):
    assert parse_rate(text) == rate_bps


@pytest.mark.parametrize("text", ["", "fast", "20", "20 mb", "-1mbit", "0mbit", "1kbit", "1e3mbit"])
def test_bad_rate_is_refused(text):
    with pytest.raises(ConfigError, match=r"rate must be none, or a number with kbit"):
        parse_rate(text)


def test_a_pause_lends_at_most_a_millisecond_or_two_frames():
    assert burst_bytes(1e9) == 125_000
    assert burst_bytes(20e6) == 2 * FRAME_BYTES


def test_square_wave_alternates():
    wave = list(itertools.islice(square_wave("100mbit", "20mbit", 10.0), 3))
    assert [(event.at_s, event.rate_bps) for event in wave] == [(0, 100e6), (5, 20e6), (10, 100e6)]


def test_random_walk_stays_in_its_bounds_and_repeats_with_its_seed():
    def walk(seed):
        events = itertools.islice(random_walk("5mbit", "100mbit", 2.0, seed), 500)
        return [(event.at_s, event.rate_bps) for event in events]

    rates = [rate for _, rate in walk(7)]
    assert walk(7) == walk(7) != walk(8)
    assert all(5e6 * (1 - 1e-9) <= rate <= 100e6 * (1 + 1e-9) for rate in rates)
    # A reflected walk spends equal time in equal intervals of the logarithm; the middle of 5 and
    # 100 is 22.4. 500 steps that decorrelate in about 40 leave a spread of a factor 2 at most.
    assert 11e6 < statistics.median(rates) < 45e6
    assert max(rates) > 50e6
    assert min(rates) < 10e6


def test_merge_keeps_the_order_of_time():
    events = merge(steps([(0, "20mbit"), (4, "5mbit")]), outages([(3, 2)], host=1))
    assert [(event.at_s, event.action, event.host) for event in events] == [
        (0, "rate", None),
        (3, "down", 1),
        (4, "rate", None),
        (5, "up", 1),
    ]


def test_schedule_is_parsed():
    assert list(parse_schedule("steps:0=100mbit,10=none,host=1,direction=send")) == [
        Event(0, "rate", 100e6, 1, "send"),
        Event(10, "rate", None, 1, "send"),
    ]
    assert list(parse_schedule("outage:at=30,for=2")) == outages([(30, 2)])
    wave = parse_schedule("square:high=100mbit,low=20mbit,period=10")
    assert next(iter(wave)) == Event(0, "rate", 100e6)
    walk = parse_schedule("walk:low=5mbit,high=100mbit,every=2,seed=7")
    assert next(iter(walk)) == next(random_walk("5mbit", "100mbit", 2, 7))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "steps",
        "steps:now=100mbit",
        "square:high=100mbit,low=20mbit",
        "square:high=1mbit,low=2mbit,period=1,pitch=3",
        "walk:low=5mbit,high=100mbit,every=2",
        "outage:at=3",
        "sine:period=2",
    ],
)
def test_bad_schedule_is_refused(text):
    with pytest.raises(ConfigError, match=r"--schedule must be steps:, square:, walk: or outage:"):
        parse_schedule(text)


def test_bad_values_in_a_schedule_are_refused():
    with pytest.raises(ConfigError, match=r"times must be >= 0 and in order, got \[4.0, 2.0\]"):
        parse_schedule("steps:4=1mbit,2=2mbit")
    with pytest.raises(ConfigError, match=r"period must be above 0 seconds, got 0.0"):
        parse_schedule("square:high=2mbit,low=1mbit,period=0")
    with pytest.raises(ConfigError, match=r"low must be a rate below high"):
        parse_schedule("walk:low=5mbit,high=5mbit,every=1,seed=0")
    with pytest.raises(ConfigError, match=r"rate must be none"):
        parse_schedule("steps:0=fast")


class Notebook:
    """Links that only write down what was asked of them."""

    def __init__(self, broken=False):
        self.broken = broken
        self.calls = []

    def set_rate(self, rate, host=None, direction="both"):
        if self.broken:
            raise GradPruneError("the link is broken")
        self.calls.append(("rate", rate, host, direction))

    def set_link(self, *, up, host=None):
        self.calls.append(("link", up, host))


def test_player_applies_every_event():
    links = Notebook()
    player = Player(links, merge(steps([(0, "20mbit")], 1, "send"), outages([(0.01, 0.01)])))
    player.wait(30)
    assert links.calls == [("rate", 20e6, 1, "send"), ("link", False, None), ("link", True, None)]
    assert [played.event.at_s for played in player.played] == [0, 0.01, 0.02]
    assert all(played.late_s >= 0 for played in player.played)
    assert player.played[-1].time_s - player.played[0].time_s > 0


def test_player_stops_in_an_endless_schedule():
    with Player(Notebook(), square_wave("2mbit", "1mbit", 7200.0)) as player:
        pass
    assert len(player.played) <= 1


def test_player_hands_over_what_ended_it():
    player = Player(Notebook(broken=True), steps([(0, "20mbit")]))
    with pytest.raises(GradPruneError, match="the link is broken"):
        player.wait(30)


# ---- refusals ------------------------------------------------------------------------------


def test_one_sentence_names_everything_that_is_missing(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(requirements, "find_command", lambda name: None if "s" in name else name)
    with pytest.raises(
        MissingDependencyError, match=r"^The test bed needs root, unshare, .*pdsh: "
    ) as e:
        requirements.check()
    assert str(e.value).endswith(
        "start it with sudo; apt-get install openssh-client openssh-server pdsh util-linux."
    )


def test_nothing_missing_is_no_sentence(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(requirements, "find_command", lambda name: name)
    assert requirements.missing() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hosts": 1}, "hosts must be 2 to 8, got 1"),
        ({"hosts": 9}, "hosts must be 2 to 8, got 9"),
        ({"slots": 0}, "slots must be 1 or more, got 0"),
        ({"rate": "fast"}, "rate must be none"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Bed(**arguments)


def test_command_line_tells_a_fault_in_one_line(capsys):
    assert command_line.main(["--rate", "fast", "--", "true"]) == 2
    assert capsys.readouterr().err.startswith("error: rate must be none")


# ---- links ---------------------------------------------------------------------------------

# Sends argv[1] bytes and waits until the other end says that it has them all.
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


@pytest.fixture(scope="module", autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Beds in a folder of our own: others on this machine neither add to it nor sweep it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("beds"))
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="module")
def shared_bed() -> Iterator[Bed]:
    with Bed(hosts=2, rate="100mbit") as bed:
        yield bed


@pytest.fixture
def bed(shared_bed: Bed) -> Iterator[Bed]:
    """Two hosts at 100 Mbit/s."""
    yield shared_bed
    shared_bed.set_rate("100mbit")
    shared_bed.set_link(up=True)


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


# ---- the end -------------------------------------------------------------------------------


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
