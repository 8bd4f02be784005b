"""The store of a run whose rank 0 may be lost: a process that ends with the run, and not before."""

from __future__ import annotations

import signal

import psutil
import pytest
import torch.distributed as dist

from launch.support.kept_store import keep_apart, release
from launch.support.place import Place
from tests.helpers.scripts import free_port

pytestmark = pytest.mark.timeout(60)


def test_the_store_outlives_a_signal_to_all_processes_of_a_run() -> None:
    """DeepSpeed's launcher ends everything below a rank first: ranks that save had no store."""
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    before = {child.pid for child in psutil.Process().children()}
    keep_apart(Place(0, 2, 0, 2), environ)
    [keeper] = [child for child in psutil.Process().children() if child.pid not in before]
    store = dist.TCPStore("127.0.0.1", int(environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        keeper.send_signal(number)
    assert [store.add("beats", 1) for _ in range(50)] == list(range(1, 51))
    assert keeper.is_running()
    release(0)
    assert keeper.wait(20.0) == 0
