"""One host of the bed: run a command on it, shape its link, read its counters."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ds_gradprune.errors import ConfigError
from tools.netbed.rates import piece_arguments, shape_arguments
from tools.netbed.space import WHOLE_HOST, Space, tool_environ

INTERFACE = "eth0"

Direction = Literal["send", "receive", "both"]
DIRECTIONS = ("send", "receive", "both")


@dataclass(frozen=True, slots=True)
class Counters:
    """What crossed one host's link since the bed was set up.

    Whole Ethernet frames as they would be on the wire: 14 bytes of Ethernet header, IP, TCP and
    payload; no preamble, checksum or gap. A segment that the kernel hands over in one piece with
    others (segmentation offload) counts with its own headers.

    Attributes:
        sent_bytes, sent_frames: left the host, behind its shaper.
        received_bytes, received_frames: reached the host, behind the switch's shaper.
        dropped_frames: were lost because a queue was full, in either direction.
    """

    sent_bytes: int
    received_bytes: int
    sent_frames: int
    received_frames: int
    dropped_frames: int

    def __sub__(self, earlier: Counters) -> Counters:
        """What crossed the link between two readings."""
        return Counters(
            self.sent_bytes - earlier.sent_bytes,
            self.received_bytes - earlier.received_bytes,
            self.sent_frames - earlier.sent_frames,
            self.received_frames - earlier.received_frames,
            self.dropped_frames - earlier.dropped_frames,
        )


class Host:
    """One host: a set of namespaces and one port of the switch.

    Args:
        index: 0 .. number of hosts - 1.
        address: IPv4 address on the bed's network.
        cores: those that everything on the host runs on.
        folder: the bed's folder.
        sshd: path of sshd.
        switch: the namespace that holds the bridge.
    """

    def __init__(
        self,
        index: int,
        address: str,
        cores: Sequence[int],
        folder: str,
        sshd: str,
        switch: Space,
    ) -> None:
        self.index, self.address, self.cores = index, address, tuple(cores)
        self.name = host_name(index)
        self._switch = switch
        self._port = f"port{index}"
        self._cores = ",".join(str(core) for core in cores)
        self.space = Space(WHOLE_HOST, ["host", folder, self.name, self._cores, sshd])

    # ---- the link ------------------------------------------------------------------------------

    def connect(self, prefix: int, rate_bps: float | None) -> None:
        """Wait for the host, and plug its cable into the switch."""
        self.space.wait_ready()
        self._switch.call(
            *("ip", "link", "add", self._port, "type", "veth"),
            *("peer", "name", INTERFACE, "netns", str(self.space.pid)),
        )
        for words in (
            ("ip", "link", "set", "lo", "up"),
            ("ip", "address", "add", f"{self.address}/{prefix}", "dev", INTERFACE),
            ("ip", "link", "set", INTERFACE, "up"),
        ):
            self.space.call(*words)
        self.set_rate(rate_bps, "both")
        self._switch.call("ip", "link", "set", self._port, "master", "bridge", "up")

    def set_rate(self, rate_bps: float | None, direction: Direction) -> None:
        """Hold the link to a rate from now on; what is in the queues stays there.

        Raises:
            ConfigError: an unknown direction.
        """
        if direction not in DIRECTIONS:
            raise ConfigError(f"direction must be one of {DIRECTIONS}, got {direction!r}.")
        pieces, shape = piece_arguments(rate_bps), shape_arguments(rate_bps)
        ends = {"send": (self.space, INTERFACE), "receive": (self._switch, self._port)}
        for space, device in ends.values() if direction == "both" else [ends[direction]]:
            space.call("ip", "link", "set", "dev", device, *pieces)
            space.call("tc", "qdisc", "replace", "dev", device, "root", *shape)

    def set_link(self, *, up: bool) -> None:
        """Plug the cable in or pull it, at the switch; what is in the queues is lost then."""
        self._switch.call("ip", "link", "set", self._port, "up" if up else "down")

    def counters(self) -> Counters:
        """What has crossed the link so far."""
        sent = _queue(self.space.call("tc", "-s", "-j", "qdisc", "show", "dev", INTERFACE))
        received = _queue(self._switch.call("tc", "-s", "-j", "qdisc", "show", "dev", self._port))
        return Counters(
            sent_bytes=sent["bytes"],
            received_bytes=received["bytes"],
            sent_frames=sent["packets"],
            received_frames=received["packets"],
            dropped_frames=sent["drops"] + received["drops"],
        )

    # ---- commands ------------------------------------------------------------------------------

    def command(
        self, words: Sequence[str | os.PathLike[str]], cwd: str | os.PathLike[str] | None = None
    ) -> list[str]:
        """The command that, run on the machine, runs `words` on this host, on its cores.

        Args:
            words: the command and its arguments.
            cwd: its folder; None: the caller's.
        """
        place = ["env", f"--chdir={os.fspath(cwd if cwd is not None else os.getcwd())}"]
        words = [os.fspath(word) for word in words]
        ends = ["setpriv", "--pdeathsig", "TERM"]
        return self.space.command(*ends, "taskset", "--cpu-list", self._cores, *place, *words)

    def popen(
        self,
        words: Sequence[str | os.PathLike[str]],
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a command on the host.

        The process returned is the one that entered the host and waits there. When it is ended,
        the command gets a SIGTERM.

        Args:
            words: the command and its arguments.
            cwd: its folder; None: the caller's.
            env: its whole environment; None: the caller's.
            options: of subprocess.Popen.
        """
        environ = tool_environ() if env is None else dict(env)
        return subprocess.Popen(self.command(words, cwd), env=environ, **options)

    def run(
        self,
        words: Sequence[str | os.PathLike[str]],
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command on the host to its end.

        Args:
            words: the command and its arguments.
            cwd: its folder; None: the caller's.
            env: its whole environment; None: the caller's.
            options: of subprocess.run.
        """
        environ = tool_environ() if env is None else dict(env)
        return subprocess.run(self.command(words, cwd), env=environ, **options)


def host_name(index: int) -> str:
    """The name that ssh, pdsh and the hostfile know a host by."""
    return f"host-{index}"


def _queue(report: str) -> dict[str, int]:
    """The root queue's statistics from what `tc -s -j qdisc show` wrote."""
    root: dict[str, int] = json.loads(report)[0]
    return root
