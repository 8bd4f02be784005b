"""The roll call before a run: who came, who did not, told once and by name.

PyTorch waits half an hour for a rank that never comes, and then prints a traceback without a name.
Here every rank writes its host's name into a store on rank 0's host, rank 0 waits until all names
are there or the time is up, and tells all who came what it found. Knows nothing of DeepSpeed but
how its launcher's arguments name the hosts.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_gradprune.errors import ConfigError, TransportError, TransportTimeout
from ds_gradprune.wire.silence import LATE_S, deadline

from .place import Place
from .seat import take_seat

PREFIX = "ds_gradprune/roll_call"
FIRST_NAP_S, LONGEST_NAP_S = 0.02, 0.5
FAREWELL_S = 4.0
"""Rank 0, which keeps the store, waits so long at most until all have read what it found."""


class AbsentRanks(TransportTimeout):
    """Some rank never came; `rank` is the one that should tell the user."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True, slots=True)
class Clock:
    """Time, so that tests can do without waiting."""

    now: Callable[[], float] = time.monotonic
    nap: Callable[[float], None] = time.sleep


def open_store(place: Place, environ: Mapping[str, str], timeout_s: float) -> Any:
    """The store that torch's own `env://` rendezvous uses afterwards. Collective: all ranks.

    It must be kept until that is done: its server is shared by all stores of this port.

    Args:
        place: of this process.
        environ: with MASTER_ADDR and MASTER_PORT.
        timeout_s: so long rank 0 is looked for.

    Raises:
        AbsentRanks: rank 0 was not found.
        ConfigError: MASTER_PORT is no port.
        TransportError: this is rank 0, and the port cannot be listened on.
    """
    address, port = environ["MASTER_ADDR"], port_of(environ)
    # torchrun keeps the store itself.
    keeps = place.rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not keeps and not _answers(address, port, timeout_s, Clock()):
        raise AbsentRanks(
            f"rank {place.rank} on {socket.gethostname()} did not find rank 0 at {address}, port "
            f"{port}, within {timeout_s:g} s: it has not started, {address} is not its host, or a "
            "firewall drops the port.",
            place.rank - place.local_rank,
        )
    listener = listener_of(place, address, port) if keeps else None
    try:
        return dist.TCPStore(  # type: ignore[attr-defined] # torch
            "127.0.0.1" if keeps and listener is None else address,
            port,
            place.world_size,
            is_master=keeps,
            timeout=timedelta(seconds=max(timeout_s, FAREWELL_S)),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=None if listener is None else listener.detach(),
        )
    except dist.DistNetworkError as exc:
        reason = str(exc).strip().splitlines()[0].rstrip(".")
        raise TransportError(
            f"rank {place.rank} must be able to {'listen on' if keeps else 'use'} port {port} of "
            f"{'its host' if keeps else address}: {reason}. End what uses it, or say --master_port."
        ) from exc


def listener_of(place: Place, address: str, port: int) -> socket.socket | None:
    """A socket that listens at MASTER_ADDR alone; torch's own listens on all interfaces.

    None where others may know the host under another address: where this host takes the name for
    its loopback, as Debian's /etc/hosts says, or behind NAT. There torch's own serves.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        several_hosts = place.local_world_size < place.world_size
        if several_hosts and ipaddress.ip_address(where[0]).is_loopback:
            return None
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(max(128, 2 * place.world_size))
    except (OSError, ValueError):  # a port that is in use is told by torch
        return None
    return listener


def _answers(address: str, port: int, timeout_s: float, clock: Clock) -> bool:
    """Whether somebody listens there, or begins to before the time is up.

    PyTorch's own client would try twice as long, and print a C++ stack for each time.
    """
    deadline_s, nap_s = clock.now() + timeout_s, FIRST_NAP_S
    while True:
        rest_s = deadline_s - clock.now()
        try:
            socket.create_connection((address, port), max(rest_s, FIRST_NAP_S)).close()
            return True
        except OSError:
            if rest_s <= 0:
                return False
        clock.nap(nap_s)
        nap_s = min(2 * nap_s, LONGEST_NAP_S)


def call_roll(
    store: Any, place: Place, host: str, timeout_s: float, listed: Sequence[str], clock: Clock
) -> None:
    """Return when all ranks are there. Collective: all ranks.

    Args:
        store: of all ranks.
        place: of this process.
        host: name of this process's host.
        timeout_s: so long rank 0 waits; what the others were given counts for nothing here.
        listed: host of every rank, as the launcher was told; empty: not known.
        clock: the time.

    Raises:
        AbsentRanks: on all that came; rank 0 should tell. Or rank 0 was there, and hangs.
    """
    names = [f"{PREFIX}/host/{rank}" for rank in range(place.world_size)]
    found, read = f"{PREFIX}/found", [f"{PREFIX}/read/{r}" for r in range(place.world_size)]
    store.set(names[place.rank], host)
    if place.rank == 0:
        store.set(f"{PREFIX}/timeout_s", repr(timeout_s))
        absent = _await(store, names, timeout_s, clock)
        message = _describe(store, names, absent, timeout_s, listed) if absent else ""
        store.set(found, message)
        if message:
            came = [key for key, name in zip(read, names, strict=True) if name not in absent]
            _await(store, came[1:], FAREWELL_S, clock)
    else:
        _await(store, [f"{PREFIX}/timeout_s"], timeout_s, clock)
        limit_s = float(store.get(f"{PREFIX}/timeout_s")) + FAREWELL_S
        if _await(store, [found], limit_s, clock):
            raise AbsentRanks(
                f"rank 0 must say within {limit_s:g} s who has come, but rank {place.rank} on "
                f"{host} has heard nothing: rank 0 hangs.",
                place.rank - place.local_rank,
            )
        message = store.get(found).decode()
        store.set(read[place.rank], "")
    if message:
        raise AbsentRanks(message, rank=0)


def meet(place: Place, environ: Mapping[str, str], timeout_s: float) -> Any:
    """Find all ranks, or say who is missing. Collective: all ranks.

    Args:
        place: of this process.
        environ: with MASTER_ADDR and MASTER_PORT.
        timeout_s: of rank 0 for the others, and of the others for rank 0.

    Returns:
        What must be kept until torch.distributed is initialised.

    Raises:
        AbsentRanks: some rank never came, or rank 0 went away.
        TransportError: this is rank 0, and the port cannot be listened on; or see `take_seat`.
    """
    # torch's store has no time-out for an answer: a host that is frozen or cut off gives none.
    with deadline(timeout_s + LATE_S, "finding rank 0"):
        store = open_store(place, environ, timeout_s)
    listed = hosts_of_launcher(parent_words(), place.world_size)
    try:
        with deadline(timeout_s + LATE_S, "finding the other ranks"):
            host, attempt = socket.gethostname(), environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            take_seat(store, place, host, attempt)
            call_roll(store, place, host, timeout_s, listed, Clock())
    except dist.DistError as exc:
        reason = str(exc).strip().splitlines()[0]
        raise AbsentRanks(
            f"rank {place.rank} on {socket.gethostname()} has lost rank 0 before all had come; "
            f"look at what that one wrote. PyTorch says: {reason}",
            place.rank - place.local_rank,
        ) from exc
    return store


def hosts_of_launcher(words: Iterable[str], world_size: int) -> list[str]:
    """Every rank's host from the command line of DeepSpeed's launcher on a host. Pure.

    Returns:
        Names in rank order; nothing where the words are no such command line.
    """
    for word in words:
        name, _, value = word.partition("=")
        if name == "--world_info":
            try:
                hosts = json.loads(base64.urlsafe_b64decode(value))
                listed = [host for host, slots in hosts.items() for _ in slots]
            # Only names in a message depend on it, and whatever it is, it is none of the user's.
            except (ValueError, TypeError, AttributeError, RecursionError):
                return []
            return listed if len(listed) == world_size else []
    return []


def port_of(environ: Mapping[str, str]) -> int:
    """The port of rank 0's store. Pure.

    Raises:
        ConfigError: MASTER_PORT is none.
    """
    port = environ["MASTER_PORT"]
    if not (port.isascii() and port.isdecimal() and len(port) < 6 and 0 < int(port) < 2**16):
        raise ConfigError(
            f"MASTER_PORT must be a port, 1 to 65535, got {port[:40]!r}. Set a free one of rank "
            "0's host."
        )
    return int(port)


def parent_words() -> list[str]:
    """The command line of the process that started this one; nothing where it cannot be read."""
    try:
        text = Path(f"/proc/{os.getppid()}/cmdline").read_text()
    except OSError:
        return []
    return text.split("\0") if "deepspeed.launcher.launch" in text else []


def _await(store: Any, keys: Sequence[str], timeout_s: float, clock: Clock) -> list[str]:
    """Wait until all keys are there; the ones that are not when the time is up."""
    deadline_s, nap_s = clock.now() + timeout_s, FIRST_NAP_S
    while True:
        late = clock.now() >= deadline_s
        absent = [key for key in keys if not store.check([key])]
        if late or not absent:
            return absent
        clock.nap(nap_s)
        nap_s = min(2 * nap_s, LONGEST_NAP_S)


def _describe(
    store: Any, names: Sequence[str], absent: Sequence[str], timeout_s: float, listed: Sequence[str]
) -> str:
    """Who never came, and who did."""

    def told(rank: int, host: str | None) -> str:
        return f"rank {rank}" + ("" if host is None else f" on {host}")

    ranks = range(len(names))
    missing = [told(r, listed[r] if listed else None) for r in ranks if names[r] in absent]
    came = [told(r, store.get(names[r]).decode()) for r in ranks if names[r] not in absent]
    return (
        f"{len(missing)} of {len(names)} ranks never came within {timeout_s:g} s: "
        f"{', '.join(missing)}. There {'is' if len(came) == 1 else 'are'} {', '.join(came)}. Look "
        "at what the missing ones wrote first; the seconds are gradient_pruning.timeout_s."
    )
