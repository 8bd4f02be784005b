"""What launch/supervise.py runs on hosts whose ranks ended: which others do I reach, and hear?

Run as a script, with the standard library alone. Lines are JSON. The first one of stdin names this
host, the second one all others. Answers have the key "hearing"::

    {"name": "host-a", "interface": "eth0", "limit_s": 5}
    {"others": {"host-b": ["10.0.0.2", 40001, 50001]}}

    {"hearing": 1, "ends": ["10.0.0.1", 40000, 50000]}
    {"hearing": 1, "reached": {"host-b": false}, "heard": ["host-b"]}

A connection needs both directions, so `reached` decides. It is null where the name is unknown here,
or a firewall refuses. Datagrams tell the direction. They are sent until stdin ends.
"""

import contextlib
import errno
import fcntl
import json
import os
import select
import socket
import struct
import sys
import time

_EVERY_S = 0.1
_SIOCGIFADDR = 0x8915
_SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
_STDIN, _STDOUT = 0, 1


def tell(**facts: object) -> None:
    """Write one line."""
    os.write(_STDOUT, json.dumps({"hearing": 1} | facts).encode() + b"\n")


def address_of(interface: str) -> str:
    """The IPv4 address of the interface that gloo is told to take; empty: of none, or unknown."""
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
    return ""


class Ear:
    """One host's answers.

    Args:
        name: of this host.
        address: of its interface; empty: all of them.
    """

    def __init__(self, name: str, address: str) -> None:
        self._name = name.encode()
        self._server = socket.create_server((address, 0), backlog=64)
        self._datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._datagrams.bind((address, 0))
        self.reached: dict[str, bool | None] = {}
        self.heard: set[str] = set()
        self._calls: dict[int, tuple[str, socket.socket]] = {}
        self._targets: list[tuple[str, int]] = []

    def ends(self) -> list[int]:
        """Ports: of connections, and of datagrams."""
        return [self._server.getsockname()[1], self._datagrams.getsockname()[1]]

    def call(self, others: dict[str, list]) -> None:  # type: ignore[type-arg] # plain JSON
        """Begin to connect to all others: name -> address, and both ports."""
        for name, (address, port, datagrams) in others.items():
            self.reached[name] = None
            try:
                numeric = socket.gethostbyname(address)
            except OSError:
                continue
            self._targets.append((numeric, datagrams))
            call = socket.socket()
            call.setblocking(False)
            call.connect_ex((numeric, port))
            self.reached[name] = False
            self._calls[call.fileno()] = (name, call)

    def listen(self, others: "set[str]") -> bool:
        """Send, take in what comes for a moment; whether there is nothing more to wait for."""
        for target in self._targets:
            with contextlib.suppress(OSError):
                self._datagrams.sendto(self._name, target)
        readable = [self._server, self._datagrams]
        can_read, can_write, _ = select.select(readable, list(self._calls), [], _EVERY_S)
        if self._server in can_read:
            self._server.accept()[0].close()
        if self._datagrams in can_read:
            self.heard.add(self._datagrams.recv(1024).decode(errors="replace"))
        for number in can_write:
            name, call = self._calls.pop(number)
            fault = call.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self.reached[name] = True if not fault else False if fault in _SILENT else None
            call.close()
        return not self._calls and others <= self.heard


def main() -> int:
    """Answer, and send until stdin ends."""
    job = json.loads(sys.stdin.readline())
    interface = job["interface"] or os.environ.get("GLOO_SOCKET_IFNAME", "")
    address = address_of(interface.split(",")[0]) if interface else ""
    ear = Ear(job["name"], address)
    tell(ends=[address or job["name"], *ear.ends()])
    others = json.loads(sys.stdin.readline() or '{"others": {}}')["others"]
    ear.call(others)
    began_s, is_told = time.monotonic(), False
    while time.monotonic() - began_s < 3 * job["limit_s"]:
        is_done = ear.listen(set(others))
        if not is_told and (is_done or time.monotonic() - began_s > job["limit_s"]):
            is_told = True
            tell(reached=ear.reached, heard=sorted(ear.heard & set(others)))
        if select.select([_STDIN], [], [], 0)[0] and not os.read(_STDIN, 4096):
            return 0
        time.sleep(_EVERY_S / 10)
    return 0


if __name__ == "__main__":
    sys.exit(main())
