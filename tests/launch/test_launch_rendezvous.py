"""The roll call: all ranks come, one never comes, and what the ones that came are told."""

from __future__ import annotations

import base64
import itertools
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ds_gradprune.errors import ConfigError, TransportError, TransportTimeout
from launch.support.place import Place
from launch.support.rendezvous import (
    AbsentRanks,
    Clock,
    call_roll,
    hosts_of_launcher,
    open_store,
    port_of,
)
from launch.support.seat import take_seat
from tests.helpers import scripts

WORDS = ["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=", "--node_rank=0"]


STOPPED = Clock(now=lambda: 0.0, nap=lambda _seconds: None)


def answer(
    store: Any, ranks: list[int], clock: Clock = STOPPED, listed: list[str] | None = None
) -> dict[int, Any]:
    """What each of some ranks of four gets out of a roll call of 7 s; `clock` is rank 0's."""
    answers: dict[int, Any] = {}

    def come(rank: int) -> None:
        place, own = Place(rank, 4, rank % 2, 2), STOPPED if rank else clock
        try:
            call_roll(store, place, f"host-{rank // 2}", 7.0, listed or [], own)
            answers[rank] = None
        except TransportTimeout as exc:
            answers[rank] = exc

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def clock_that_waits_for(condition: Callable[[], bool]) -> Clock:
    """No time goes by until the condition holds; then all of it, between two looks at the clock."""
    looks = itertools.count()
    return Clock(now=lambda: 1e6 if next(looks) and condition() else 0.0, nap=lambda _seconds: None)


def test_all_ranks_come() -> None:
    assert answer(dist.HashStore(), [0, 1, 2, 3]) == dict.fromkeys(range(4))


@pytest.mark.parametrize(
    ("listed", "missing"),
    [
        (None, "2 of 4 ranks never came within 7 s: rank 2, rank 3. "),
        (
            ["host-a", "host-a", "host-b", "host-b"],
            "2 of 4 ranks never came within 7 s: rank 2 on host-b, rank 3 on host-b. ",
        ),
    ],
)
def test_the_ranks_that_never_came_are_named_on_all_that_did(listed, missing) -> None:
    store = dist.HashStore()
    # Rank 0 sees its time go by when rank 1 is there, however late that is.
    clock = clock_that_waits_for(lambda: store.check(["ds_gradprune/roll_call/host/1"]))
    answers = answer(store, [0, 1], clock, listed)
    assert answers.keys() == {0, 1}
    for fault in answers.values():
        assert isinstance(fault, AbsentRanks)
        assert fault.rank == 0  # the one that tells
        assert str(fault).startswith(
            missing + "There are rank 0 on host-0, rank 1 on host-0. Look at"
        )


def test_a_rank_zero_that_hangs_is_told_by_the_first_rank_of_each_host() -> None:
    store = dist.HashStore()
    store.set("ds_gradprune/roll_call/timeout_s", "7.0")
    late = Clock(now=iter([0.0, 0.0, 0.0, 100.0]).__next__, nap=lambda _seconds: None)
    with pytest.raises(AbsentRanks, match=r"within 11 s .* rank 3 on host-1 .* hangs") as caught:
        call_roll(store, Place(3, 4, 1, 2), "host-1", 7.0, [], late)
    assert caught.value.rank == 2


def test_a_port_in_use_is_told_by_rank_zero() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        with pytest.raises(
            TransportError, match=r"rank 0 must be able to listen on port .* in use"
        ):
            open_store(Place(0, 2, 0, 1), environ, 7.0)


def test_a_second_process_of_one_rank_is_refused() -> None:
    """Rank 1 of a second run on the same port waited in the store of the first one."""
    store = dist.HashStore()
    take_seat(store, Place(1, 2, 0, 1), "host-b", "0")
    take_seat(store, Place(0, 2, 0, 1), "host-a", "0")
    with pytest.raises(TransportError, match=r"rank 1 must be one .* on host-b is it, too"):
        take_seat(store, Place(1, 2, 0, 1), "host-c", "0")
    take_seat(store, Place(1, 2, 0, 1), "host-c", "1")  # torchrun's store outlives a restart
    with pytest.raises(TransportError, match=r"rank 2 on host-c counts 3, and another one 2"):
        take_seat(store, Place(2, 3, 0, 1), "host-c", "0")


def test_hosts_are_those_of_the_launcher() -> None:
    world = base64.urlsafe_b64encode(json.dumps({"host-a": [0, 1], "host-b": [0]}).encode())
    words = [word + world.decode() if word.endswith("=") else word for word in WORDS]
    assert hosts_of_launcher(words, 3) == ["host-a", "host-a", "host-b"]
    assert hosts_of_launcher(words, 4) == []  # some other start than the one listed
    assert hosts_of_launcher(["mpirun", "-n", "3", "python"], 3) == []


# ---- whole processes: nobody comes, so however slow they are, the outcome is the same ------------


def start_one(rank: int, folder: Path) -> subprocess.Popen[str]:
    """launch/train.py as one of two ranks, one on each host; the other is never started."""
    config = scripts.CONFIG["gradient_pruning"] | {"timeout_s": 2.0}
    scripts.write_config(folder / "config.json", gradient_pruning=config)
    environ = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    return subprocess.Popen(
        [sys.executable, "launch/train.py", "--config", str(folder / "config.json")],
        cwd=scripts.ROOT,
        env=scripts.script_environ()
        | environ
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": scripts.free_port()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "error: 1 of 2 ranks never came within 2 s: rank 1. There is rank 0 on "),
        (1, "error: rank 1 on "),
    ],
)
def test_a_lonely_rank_ends_with_one_error_and_code_two(rank, message, tmp_path: Path) -> None:
    process = start_one(rank, tmp_path)
    (said,) = scripts.finish([process])
    assert process.returncode == 2, said
    told = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert told[0].startswith(message)
    if rank == 1:
        assert "did not find rank 0 at 127.0.0.1, port" in told[0]
        assert "within 2 s" in told[0]
    assert "Traceback" not in said
    assert "frame #" not in said  # nor PyTorch's own


def test_the_store_listens_at_its_address_alone() -> None:
    """It listened on all interfaces, and whoever reaches it can end a run."""
    port = scripts.free_port()
    store = open_store(Place(0, 2, 0, 2), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, 5.0)
    store.set("key", "value")
    own = f":{int(port):04X}"
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    listening = [row[1] for row in rows if row[1].endswith(own) and row[3] == "0A"]
    assert listening == [f"0100007F{own}"]


@pytest.mark.parametrize("port", ["", "x", "0", "65536", "-1", "9" * 5000, "\u0661"])
def test_a_port_that_is_none_is_named(port: str) -> None:
    with pytest.raises(ConfigError, match="MASTER_PORT must be a port, 1 to 65535, got"):
        port_of({"MASTER_PORT": port})


@pytest.mark.parametrize(
    "word", ["bm90IGpzb24=", "e30=x", "W10=", "bnVsbA==", "eyJhIjogNX0=", "\xff"]
)
def test_a_launchers_word_that_says_nothing_names_no_host(word: str) -> None:
    assert hosts_of_launcher([f"--world_info={word}"], 2) == []
