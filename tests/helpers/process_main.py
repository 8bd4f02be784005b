"""What `run_processes` runs: functions of one rank, with the process group opened from a file."""

from __future__ import annotations

import os
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


def transport_contract(name: str) -> list[Any]:
    """Run one contract check over the torch transport."""
    from ds_gradprune.transport.torchdist import TorchDistTransport
    from tests import test_transport_contract as contract

    open_group()
    try:
        with TorchDistTransport(timeout_s=20.0) as transport:
            return getattr(contract, name)(transport)
    finally:
        dist.destroy_process_group()


def transport_timeout() -> str:
    """Rank 1 never comes: what does rank 0 get?"""
    from ds_gradprune.errors import TransportError
    from ds_gradprune.transport.torchdist import TorchDistTransport

    open_group()
    transport = TorchDistTransport(timeout_s=1.0)
    if transport.rank == 1:
        return "absent"
    out = torch.empty((2, 4), dtype=torch.uint8)
    try:
        transport.all_gather(torch.zeros(4, dtype=torch.uint8), out)
    except TransportError as exc:
        return f"{type(exc).__name__}: {exc}"
    return "no error"
