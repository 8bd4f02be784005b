"""What `run_processes` runs: functions of one rank, with the process group opened from a file."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def open_group() -> None:
    """Open gloo from the test's store file; no port is involved in the rendezvous."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['DS_TEST_STORE']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def transport_contract(names: list[str]) -> dict[str, Any]:
    """Run the checks of every transport over torch.distributed."""
    from ds_gradprune.wire.torchdist import TorchDistTransport
    from tests.helpers.transport_checks import run_check

    open_group()
    with TorchDistTransport(timeout_s=20.0) as transport:
        return {name: run_check(name, transport) for name in names}


def transport_faults(fault: str) -> list[str]:
    """Rank 1 is absent, or its process ends: what does rank 0 get, twice?"""
    from ds_gradprune.errors import TransportError
    from ds_gradprune.wire.torchdist import TorchDistTransport

    open_group()
    transport = TorchDistTransport(timeout_s=1.0 if fault == "absent" else 20.0)
    gone = Path(os.environ["DS_TEST_STORE"]).with_name("gone")
    if transport.rank == 1:
        while fault == "absent" and not gone.exists():
            threading.Event().wait(0.01)
        return []
    heard = []
    for _ in range(2):
        out = torch.empty((transport.world_size, 4), dtype=torch.uint8)
        try:
            transport.all_gather(torch.zeros(4, dtype=torch.uint8), out)
        except TransportError as exc:
            heard.append(f"{type(exc).__name__}: {exc}")
    gone.touch()
    return heard


def channel_disagrees(what: str) -> list[str]:
    """Rank 1 decides for another k, or has a message of another size: what do both hear?"""
    from ds_gradprune import codec
    from ds_gradprune.errors import GradPruneError
    from ds_gradprune.wire.all_gather import AllGather
    from ds_gradprune.wire.torchdist import TorchDistTransport
    from tests.helpers.wire import announcement_of

    open_group()
    channel = AllGather(TorchDistTransport(timeout_s=20.0))
    odd = channel.rank == 1
    sizes = [100, 120 if odd and what == "sizes" else 110]
    header = announcement_of(channel.rank, k=42 if odd and what == "k" else 41)
    heard = []
    try:
        assert len(header) == codec.HEADER_BYTES
        channel.announce(header, sizes).headers()
    except GradPruneError as exc:
        heard.append(f"{type(exc).__name__}: {exc}")
    # The transport is whole: the same ranks may go on, or end in order.
    again = channel.announce(announcement_of(channel.rank, k=41)).headers()
    return [*heard, str([header.rank for header in again])]


def owned_sums() -> Any:
    """Two exchanges of `OwnerReduce`: what was delivered, and what left this rank."""
    from ds_gradprune.wire.owner_reduce import OwnerReduce
    from ds_gradprune.wire.torchdist import TorchDistTransport
    from tests.helpers.wire import LAYOUTS, exchanged, vector_of

    open_group()
    channel = OwnerReduce(TorchDistTransport(timeout_s=20.0))
    return [
        exchanged(channel, [vector_of(channel.rank, b, step) for b in range(len(LAYOUTS))])
        for step in range(2)
    ]
