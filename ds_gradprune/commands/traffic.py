"""Latency and rate between two hosts over plain TCP. Standard library only.

Both ends call the same function over their ends of the same connections. A rate is counted where
bytes arrive, after the connections have got going.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PIECE_BYTES = 64 * 1024
RAMP_SHARE = 0.3
"""So much of the time passes before bytes are counted: TCP begins slowly."""

PATIENCE_S = 10.0
"""Beyond the time of a measurement, for connections and for what stands in queues."""


def listen() -> socket.socket:
    """A socket that any host can connect to, on a free port."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def accept(server: socket.socket, count: int, timeout_s: float) -> list[socket.socket]:
    """So many connections.

    Raises:
        OSError: they did not come in time.
    """
    server.settimeout(timeout_s)
    found: list[socket.socket] = []
    try:
        for _ in range(count):
            found.append(_ready(server.accept()[0], timeout_s))
    except OSError:
        close(found)
        raise
    return found


def connect(host: str, port: int, count: int, timeout_s: float) -> list[socket.socket]:
    """So many connections to a host that listens.

    Raises:
        OSError: it cannot be reached.
    """
    found: list[socket.socket] = []
    try:
        for _ in range(count):
            link = socket.create_connection((host, port), timeout_s)
            found.append(_ready(link, timeout_s))
    except OSError:
        close(found)
        raise
    return found


def close(links: Sequence[socket.socket]) -> None:
    """Close all."""
    for link in links:
        link.close()


def _ready(link: socket.socket, timeout_s: float) -> socket.socket:
    link.settimeout(timeout_s)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link


# ---- latency -------------------------------------------------------------------------------------


def ping(link: socket.socket, rounds: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Half a round trip, median, seconds; `pong` runs at the other end."""
    times_s = []
    for _ in range(rounds):
        began = clock()
        link.sendall(b"?")
        if not link.recv(1):
            raise ConnectionError("the other end has closed the connection")
        times_s.append(clock() - began)
    return 0.5 * statistics.median(times_s)


def pong(link: socket.socket, rounds: int) -> None:
    """Answer `ping`."""
    for _ in range(rounds):
        if not link.recv(1):
            raise ConnectionError("the other end has closed the connection")
        link.sendall(b"!")


# ---- rate ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Window:
    """When arriving bytes count.

    Attributes:
        start_s: after the first byte.
        stop_s: after the first byte.
    """

    start_s: float
    stop_s: float

    @classmethod
    def of(cls, seconds: float) -> Window:
        """The end of a measurement of so many seconds."""
        return cls(RAMP_SHARE * seconds, seconds)


class Meter:
    """Counts what arrives on several connections together.

    Args:
        window: see there.
        clock: seconds.
    """

    def __init__(self, window: Window, clock: Callable[[], float] = time.perf_counter) -> None:
        self._window = window
        self._clock = clock
        self._lock = threading.Lock()
        self._first_s: float | None = None
        self._bytes = 0

    def note(self, num_bytes: int) -> bool:
        """Bytes have arrived; whether more are wanted."""
        with self._lock:
            now_s = self._clock()
            if self._first_s is None:
                self._first_s = now_s
                return True
            since_s = now_s - self._first_s
            if since_s > self._window.stop_s:
                return False
            if since_s >= self._window.start_s:
                self._bytes += num_bytes
            return True

    @property
    def mbit(self) -> float:
        """Megabit per second inside the window."""
        return 8e-6 * self._bytes / (self._window.stop_s - self._window.start_s)


def flow(
    links: Sequence[socket.socket], seconds: float, *, sends: bool, receives: bool
) -> float | None:
    """Send, receive or both over all connections at once; the other end does the opposite.

    Args:
        links: connections; closed afterwards.
        seconds: of the measurement.
        sends: this end sends.
        receives: this end receives.

    Returns:
        Megabit per second that arrived here; None where nothing should.
    """
    meter = Meter(Window.of(seconds))
    threads = [threading.Thread(target=_send, args=(link, seconds)) for link in links if sends]
    if receives:
        threads += [threading.Thread(target=_receive, args=(link, meter)) for link in links]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close(links)
    return meter.mbit if receives else None


def _send(link: socket.socket, seconds: float) -> None:
    piece = bytes(PIECE_BYTES)
    end_s = time.perf_counter() + seconds + PATIENCE_S
    # The receiver closes when it has seen enough, with bytes still under way.
    with contextlib.suppress(OSError):
        while time.perf_counter() < end_s:
            link.sendall(piece)


def _receive(link: socket.socket, meter: Meter) -> None:
    with contextlib.suppress(OSError):
        while got := link.recv(PIECE_BYTES):
            if not meter.note(len(got)):
                break
        link.shutdown(socket.SHUT_RDWR)  # ends the sender, which may be blocked
