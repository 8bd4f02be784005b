"""The store of a run whose rank 0 may be lost: a process that ends with the run, and not before."""

from __future__ import annotations

import os
import signal

import pytest
import torch.distributed as dist

from launch.support.kept_store import keep_apart, release
from launch.support.place import Place
from tests.helpers.scripts import free_port

pytestmark = pytest.mark.timeout(60)


def test_the_store_outlives_a_signal_to_all_processes_of_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeepSpeed's launcher ends everything below a rank first: ranks that save had no store."""
    real, pids = os.fork, list[int]()

    def fork() -> int:
        pids.append(real())
        return pids[-1]

    monkeypatch.setattr(os, "fork", fork)
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    keep_apart(Place(0, 2, 0, 2), environ)
    store = dist.TCPStore("127.0.0.1", int(environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pids[0], number)
    assert [store.add("beats", 1) for _ in range(50)] == list(range(1, 51))
    release(0)
    assert os.waitpid(pids[0], 0)[1] == 0
