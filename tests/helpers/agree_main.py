"""One rank over gloo that compares itself with the others, for tests/deepspeed/test_agree.py."""

from __future__ import annotations

import datetime
import os

import torch.distributed as dist

from ds_gradprune.deepspeed.agree import Facts, check_ranks
from ds_gradprune.errors import GradPruneError
from ds_gradprune.wire.torchdist import TorchDistTransport


def compare_and_leave(timeout_s: float) -> tuple[str, str]:
    """What is said where ranks differ, and, on rank 0, where the others no longer come."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ["DS_TEST_STORE"], world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    said = _said(TorchDistTransport(None, timeout_s), Facts({"torch": f"2.{rank}"}))
    if rank:
        store.wait(["over"], datetime.timedelta(seconds=60))
        return said, ""
    alone = _said(TorchDistTransport(None, timeout_s), Facts({"torch": "2.0"}))
    store.set("over", "1")
    return said, alone


def _said(transport: TorchDistTransport, facts: Facts) -> str:
    try:
        check_ranks(transport, facts)
    except GradPruneError as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""
