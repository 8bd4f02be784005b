"""The store of a run in a process of its own, so that rank 0 can be lost like any other.

With `min_islands` the islands that are left agree over the store (`ds_gradprune.wire.members`). If
rank 0 kept it, as torch does, its end would be the end of all. So rank 0 starts this process, which
ends when rank 0 says so, or when rank 0 is gone and no island shows life any more.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from .place import Place
from .rendezvous import listener_of, port_of

SILENT_S = 10.0
"""When rank 0 is gone, the islands that are left show life more often."""

LOOK_S = 1.0
OVER = b"over"

_KEPT = "TORCHELASTIC_USE_AGENT_STORE"
"""What torch asks whether rank 0 should keep the store (torch 2.13, distributed/rendezvous.py)."""

_kept: list[Any] = []
"""What this process, rank 0, has started."""


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
    words = [address, str(port), str(place.world_size), str(listener.fileno())]
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, *words],
        stdin=subprocess.PIPE,
        pass_fds=[listener.fileno()],
        env={**environ} | {"PYTHONPATH": root},
        start_new_session=True,  # Ctrl-C is for the ranks
    )
    _kept.append(process)
    listener.close()


def release(code: int) -> None:
    """The run is over on this rank; where it went well, on all others as well. Local.

    Args:
        code: of this rank.
    """
    while _kept:
        process = _kept.pop()
        assert process.stdin is not None
        if code == 0:
            process.stdin.write(OVER)
        process.stdin.close()


def serve(address: str, port: int, world_size: int, descriptor: int) -> None:
    """Keep the store until it is over."""
    import torch.distributed as dist

    store = dist.TCPStore(  # type: ignore[attr-defined] # torch
        address,
        port,
        world_size,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=descriptor,
    )
    told = b""
    while select.select([0], [], [], None)[0] and (more := os.read(0, 64)):
        told += more
    if told == OVER:
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


def main(words: list[str]) -> None:
    """Keep the store that the words name, until it is over."""
    address, port, world_size, descriptor = words
    serve(address, int(port), int(world_size), int(descriptor))


if __name__ == "__main__":
    main(sys.argv[1:])
