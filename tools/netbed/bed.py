"""The bed: hosts around one switch, from first to last.

::

    owner ──stdin──> keeper of the switch: network namespace, bridge;  removes the folder at the end
      │                        port0      port1    <- tbf: what a host receives
      │                          │          │          (veth pairs)
      ├──stdin──> keeper 0 ──> eth0         │      <- tbf: what a host sends
      └──stdin──> keeper 1 ───────────────> eth0       network, mount, process, IPC, name space

Nothing has a name or a number in the machine's own namespaces: no interface, no address, no route,
no port. So beds cannot meet, and when the owner ends in any way, the kernel closes the pipes, the
keepers end, and with them everything that ran in or belonged to their namespaces.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from ds_gradprune.errors import ConfigError, GradPruneError
from tools.netbed import requirements
from tools.netbed.folder import make_folder, remove_leftovers, temporary_folder
from tools.netbed.host import INTERFACE, Direction, Host, host_name
from tools.netbed.rates import parse_rate
from tools.netbed.schedule import Event, Player
from tools.netbed.space import NETWORK_ONLY, Space

NETWORK, PREFIX = "10.77.0", 24
MIN_HOSTS, MAX_HOSTS = 2, 8

SSH_READY_S = 20.0
"""A host whose sshd does not let us in for so long never will."""

EXPORTED = ("DS_ACCELERATOR", "HF_HUB_OFFLINE", "TORCH_EXTENSIONS_DIR")
"""Variables of the caller that the processes on all hosts need as well, where they are set."""


class Bed:
    """Hosts on one machine, joined by a switch, each behind a link of its own. A context manager.

    The hosts have their own network, process numbers, shared memory and name, and share the disk.
    Each has its part of the cores, so that one does not compute on another's account; where there
    are fewer cores than hosts, hosts share. Links are limited in rate, per direction; they add no
    delay beyond their queues (at most 200 ms), because tbf has none to add.

    Args:
        hosts: how many, 2 to 8.
        rate: of every link, both directions, for example "100mbit"; "none" or None: unshaped.
        slots: processes per host, as the hostfile says.

    Raises:
        ConfigError: hosts, rate or slots are out of range.
        MissingDependencyError: root or a command is missing.
        GradPruneError: the kernel or sshd refused; nothing is left behind.

    Attributes:
        hosts: the hosts; on the first one a launcher is run.
        folder: keys and configurations.
        hostfile: for `deepspeed --hostfile`.
    """

    def __init__(self, hosts: int = 2, rate: str | float | None = None, slots: int = 1) -> None:
        if not MIN_HOSTS <= hosts <= MAX_HOSTS:
            raise ConfigError(f"hosts must be {MIN_HOSTS} to {MAX_HOSTS}, got {hosts!r}.")
        if slots < 1:
            raise ConfigError(f"slots must be 1 or more, got {slots!r}.")
        rate_bps = parse_rate(rate)
        requirements.check()
        self.leftovers = remove_leftovers()
        addresses = {host_name(index): f"{NETWORK}.{index + 1}" for index in range(hosts)}
        self.folder = make_folder(addresses, slots)
        self.hostfile = self.folder / "hostfile"
        self.hosts: tuple[Host, ...] = ()
        self._slots = slots
        self._switch: Space | None = None
        self._players: list[Player] = []
        try:
            self._open(list(addresses.values()), rate_bps)
        except BaseException:
            self.close()
            raise

    def _open(self, addresses: list[str], rate_bps: float | None) -> None:
        folder = str(self.folder)
        self._switch = switch = Space(NETWORK_ONLY, ["switch", folder])
        sshd = requirements.find_command("sshd") or "sshd"
        for index, address in enumerate(addresses):
            cores = share_of_cores(index, len(addresses))
            self.hosts += (Host(index, address, cores, folder, sshd, switch),)
        switch.wait_ready()
        switch.call("ip", "link", "add", "bridge", "type", "bridge")
        switch.call("ip", "link", "set", "bridge", "up")
        for host in self.hosts:
            host.connect(PREFIX, rate_bps)
        self._await_ssh()

    def _await_ssh(self) -> None:
        """Return when the first host gets into every host, as a launcher will have to."""
        deadline_s = time.monotonic() + SSH_READY_S
        for host in self.hosts:
            while True:
                done = self.ssh(host.index, ["true"], capture_output=True, text=True)
                if done.returncode == 0:
                    break
                if time.monotonic() > deadline_s:
                    log = (self.folder / f"{host.name}.sshd.log").read_text().strip().splitlines()
                    raise GradPruneError(
                        f"{host.name} lets nobody in: {done.stderr.strip()}; its sshd says: "
                        f"{log[-1] if log else 'nothing'}"
                    )
                time.sleep(0.05)

    # ---- the links -----------------------------------------------------------------------------

    def set_rate(
        self, rate: str | float | None, host: int | None = None, direction: Direction = "both"
    ) -> None:
        """Shape one host's link, or all, from now on.

        Args:
            rate: see `parse_rate`.
            host: index; None: all.
            direction: "send", "receive" or "both", as the host sees it.

        Raises:
            ConfigError: no such rate, host or direction.
        """
        rate_bps = parse_rate(rate)
        for one in self._pick(host):
            one.set_rate(rate_bps, direction)

    def set_link(self, *, up: bool, host: int | None = None) -> None:
        """Plug in or pull one host's cable, or all.

        Args:
            up: False pulls it.
            host: index; None: all.

        Raises:
            ConfigError: no such host.
        """
        for one in self._pick(host):
            one.set_link(up=up)

    def play(self, schedule: Iterable[Event]) -> Player:
        """Let a schedule begin now, beside whatever runs. It stops with the bed at the latest."""
        player = Player(self, schedule)
        self._players.append(player)
        return player

    def _pick(self, host: int | None) -> Sequence[Host]:
        if host is None:
            return self.hosts
        if not 0 <= host < len(self.hosts):
            raise ConfigError(f"host must be 0 to {len(self.hosts) - 1}, got {host!r}.")
        return self.hosts[host : host + 1]

    # ---- commands ------------------------------------------------------------------------------

    def ssh(
        self, host: int, words: Sequence[str], **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command on a host through ssh, from the first host; options of subprocess.run."""
        (target,) = self._pick(host)
        return self.hosts[0].run(["ssh", target.name, *words], **options)

    def environ(self, **exports: str) -> dict[str, str]:
        """The environment for a launcher on the first host.

        It names the interface, tells DeepSpeed where the variables are that every host must get
        (DS_ENV_FILE), and limits every process to its part of its host's cores. TMPDIR is the first
        host's; ssh gives every host its own.

        Args:
            exports: more variables for the processes on all hosts.
        """
        threads = max(1, len(self.hosts[0].cores) // self._slots)
        variables = {
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NCCL_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": str(threads),
            **{name: os.environ[name] for name in EXPORTED if name in os.environ},
            **exports,
        }
        env_file = self.folder / "deepspeed_env"
        env_file.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        return (
            dict(os.environ)
            | variables
            | {
                "DS_ENV_FILE": str(env_file),
                "NETBED_HOSTFILE": str(self.hostfile),
                "TMPDIR": str(temporary_folder(self.folder, self.hosts[0].name)),
            }
        )

    # ---- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """End everything that runs in the bed, and the bed. Twice is fine."""
        with contextlib.ExitStack() as stack:
            # Last in, first out; and the rest happens even if one fails.
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            if self._switch is not None:
                stack.callback(self._switch.close)
            for host in self.hosts:
                stack.callback(host.space.close)
            for host in self.hosts:
                stack.callback(host.space.let_go)
            for player in self._players:
                stack.callback(player.stop)

    def __enter__(self) -> Bed:
        """Nothing: the bed is open since it was made."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def share_of_cores(index: int, hosts: int) -> list[int]:
    """The cores of one host: an equal part of ours each; one, shared, where there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // hosts)
    return [cores[(index * share + offset) % len(cores)] for offset in range(share)]
