"""The part of doctor that runs on a host: reads orders from stdin, answers on stdout, JSON a line.

::

    {"id": 1, "do": "facts"}                    {"agent": 1, "id": 1, "result": {...}}
    {"id": 2, "do": "nonsense"}                 {"agent": 1, "id": 2, "fault": "..."}

It ends when stdin does, so it never outlives the connection that started it. What libraries print
goes to stderr. Torch is loaded by the first order that needs it.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.metadata
import json
import os
import platform
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from ds_gradprune.commands import traffic
from ds_gradprune.errors import GradPruneError

PACKAGES = ("ds_gradprune", "torch", "deepspeed", "transformers", "numpy")
"""Their versions are told."""

PINGS = 30

_SIOCGIFADDR = 0x8915
"""Linux: address of an interface."""


class Agent:
    """Carries out orders, one after the other."""

    def __init__(self) -> None:
        self._server: socket.socket | None = None
        self._orders: Mapping[str, Callable[..., Any]] = {
            "facts": facts,
            "listen": self._listen,
            "accept": self._accept,
            "connect": self._connect,
            "free_port": free_port,
            "collective": _torch_order("collective"),
            "local": _torch_order("local"),
        }

    def answer(self, line: bytes) -> dict[str, Any]:
        """Carry out one order; a fault is an answer as well."""
        order = json.loads(line)
        name, number = order.pop("do"), order.pop("id")
        try:
            result = self._orders[name](**order)
        except KeyError:
            return {"agent": 1, "id": number, "fault": f"{name!r} is not an order"}
        except (GradPruneError, OSError, RuntimeError) as exc:
            text = str(exc).strip() or type(exc).__name__
            return {"agent": 1, "id": number, "fault": text.splitlines()[0]}
        return {"agent": 1, "id": number, "result": result}

    def _listen(self) -> int:
        """A port that other hosts can connect to."""
        if self._server is None:
            self._server = traffic.listen()
        return int(self._server.getsockname()[1])

    def _accept(self, *, count: int, **what: Any) -> float | None:
        assert self._server is not None, "listen comes first"
        timeout_s = what.get("seconds", 0.0) + traffic.PATIENCE_S
        return _measure(traffic.accept(self._server, count, timeout_s), answers=True, **what)

    def _connect(self, *, host: str, port: int, count: int, **what: Any) -> float | None:
        timeout_s = what.get("seconds", 0.0) + traffic.PATIENCE_S
        return _measure(traffic.connect(host, port, count, timeout_s), answers=False, **what)


def _measure(
    links: list[socket.socket],
    *,
    answers: bool,
    seconds: float = 0.0,
    sends: bool = False,
    receives: bool = False,
) -> float | None:
    """A rate, or the latency where neither end sends or receives."""
    if sends or receives:
        return traffic.flow(links, seconds, sends=sends, receives=receives)
    try:
        if answers:
            traffic.pong(links[0], PINGS)
            return None
        return traffic.ping(links[0], PINGS)
    finally:
        traffic.close(links)


def facts() -> dict[str, Any]:
    """What is installed here, and what of the environment matters."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "DS_ACCELERATOR")
    return {
        "host": socket.gethostname(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load": os.getloadavg()[0],
        "environment": {name: os.environ[name] for name in names if name in os.environ},
        "address": address_of(os.environ.get("GLOO_SOCKET_IFNAME", "")),
    }


def address_of(interface: str) -> str | None:
    """The IPv4 address of a network interface; None: it has none, or cannot be asked for one."""
    if not interface or not sys.platform.startswith("linux"):
        return None
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return None
    return socket.inet_ntoa(found[20:24])


def version(package: str) -> str | None:
    """Of an installed package; None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def free_port() -> int:
    """A port that nobody listens on here."""
    with traffic.listen() as probe:
        return int(probe.getsockname()[1])


def _torch_order(name: str) -> Callable[..., Any]:
    def order(**arguments: Any) -> Any:
        module = importlib.import_module("ds_gradprune.commands.agent_torch")
        return getattr(module, name)(**arguments)

    return order


def serve(orders: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the orders end."""
    agent = Agent()
    for line in orders:
        answers.write(json.dumps(agent.answer(line)).encode("ascii") + b"\n")
        answers.flush()


def main() -> int:
    """Serve over stdin and stdout; what else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
