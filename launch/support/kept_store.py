"""The store of a run in a process of its own, so that rank 0 can be lost like any other.

With `min_islands` the islands that are left agree over the store (`ds_gradprune.wire.members`). If
rank 0 kept it, as torch does, its end would be the end of all. So rank 0 forks this process, which
ends when rank 0 says so, or when rank 0 is gone and no island shows life any more.

It is forked, because to import torch anew takes seconds, on a busy host more than ranks wait for
each other.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import MutableMapping
from typing import Any, NoReturn

import torch.distributed as dist

from .place import Place
from .rendezvous import listener_of, port_of

SILENT_S = 10.0
"""When rank 0 is gone, the islands that are left show life more often."""

ASKED_S = 2.0
"""Who asks to be let in when the run ends reads in the store that it has."""

LOOK_S = 1.0
OVER = b"over"

_KEPT = "TORCHELASTIC_USE_AGENT_STORE"
"""What torch asks whether rank 0 should keep the store (torch 2.13, distributed/rendezvous.py)."""

_kept: list[int] = []
"""Where this process, rank 0, tells the one that it has started to end."""


def keep_apart(place: Place, environ: MutableMapping[str, str]) -> None:
    """Start the store's process, and tell torch that somebody keeps the store. Local, for rank 0.

    Nothing happens where torchrun's agent keeps it, and where rank 0 cannot tell at which of its
    addresses to listen: there rank 0 cannot be lost.

    Args:
        place: of this process.
        environ: with MASTER_ADDR and MASTER_PORT.
    """
    if place.rank or environ.get(_KEPT) == "True":
        return
    address, port = environ["MASTER_ADDR"], port_of(environ)
    listener = listener_of(place, address, port)
    if listener is None:
        return
    environ[_KEPT] = "True"
    ends, told = os.pipe()
    if not os.fork():
        os.close(told)
        _keep(ends, address, port, place.world_size, listener.detach())
    os.close(ends)
    _kept.append(told)
    listener.close()


def release(code: int) -> None:
    """The run is over on this rank; where it went well, on all others as well. Local.

    Args:
        code: of this rank.
    """
    while _kept:
        told = _kept.pop()
        if code == 0:
            with contextlib.suppress(OSError):  # it is gone
                os.write(told, OVER)
        os.close(told)


def _keep(ends: int, address: str, port: int, world_size: int, listener: int) -> NoReturn:
    """What the forked process does; it has nothing of rank 0's to end. Local."""
    try:
        os.setsid()
        # Whoever waits for the end of a pipe of rank 0's must not wait for this process.
        low, high = sorted((ends, listener))
        for first, last in ((3, low), (low + 1, high), (high + 1, os.sysconf("SC_OPEN_MAX"))):
            os.closerange(first, last)
        # Whoever ends ranks, Ctrl-C or DeepSpeed's launcher, asks the processes below them, too.
        # They save before they end, and need the store until then.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        serve(ends, address, port, world_size, listener)
    finally:
        os._exit(0)


def serve(ends: int, address: str, port: int, world_size: int, listener: int) -> None:
    """Keep the store until it is over.

    Args:
        ends: where rank 0 tells, or is found to be gone.
        address: to listen at.
        port: likewise.
        world_size: of the run.
        listener: descriptor of a socket that listens there.
    """
    store = dist.TCPStore(  # type: ignore[attr-defined] # torch
        address,
        port,
        world_size,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener,
    )
    told = b""
    while select.select([ends], [], [], None)[0] and (more := os.read(ends, 64)):
        told += more
    if told == OVER:
        if is_asked(store):
            time.sleep(ASKED_S)
        return
    seen, changed_s = signs_of_life(store), time.monotonic()
    while time.monotonic() - changed_s < SILENT_S:
        time.sleep(LOOK_S)
        now = signs_of_life(store)
        if now != seen:
            seen, changed_s = now, time.monotonic()


def signs_of_life(store: Any) -> dict[str, bytes]:
    """What islands count up while they live."""
    return {key: store.get(key) for key in store.list_keys() if "/beat/" in key}


def is_asked(store: Any) -> bool:
    """Whether an island that was lost asks to be let in (`ds_gradprune.wire.door`)."""
    return any(store.get(key) for key in store.list_keys() if key.endswith("/ask"))
