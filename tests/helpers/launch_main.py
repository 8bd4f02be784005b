"""What `run_processes` runs for the tests of launching: one rank among real ones."""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.errors import DataError, GradPruneError, RankMismatchError
from launch.support.peers import AgreedFault, Peers, StopSwitch
from launch.support.place import find_place
from tests.helpers.process_main import open_group


def agreements(stops: list[tuple[int | None, int]], steps: int) -> dict[str, Any]:
    """Everything `Peers` and `StopSwitch` promise, asked once.

    Args:
        stops: (rank, step): which rank gets a SIGTERM in which step; one walk for each.
        steps: length of a walk.
    """
    open_group()
    peers = Peers(find_place(os.environ))

    def fault_of(*failing: int) -> tuple[str, int] | str:
        def work() -> str:
            if peers.rank in failing:
                raise DataError(f"no text on rank {peers.rank}.")
            return "fine"

        try:
            return peers.together(work)
        except AgreedFault as exc:
            return str(exc), exc.rank

    try:
        return {
            "gather": peers.gather(f"rank {peers.rank}"),
            "sum": peers.sum([1.0, 10.0 * peers.rank]),
            "no fault": fault_of(),
            "fault of 1": fault_of(1),
            "fault of both": fault_of(0, 1),
            "last steps": [_walk(peers, rank, step, steps) for rank, step in stops],
            "tells": [peers.tells(), peers.tells()],
        }
    finally:
        peers.gather(None)
        dist.destroy_process_group()


def _walk(peers: Peers, asked_rank: int | None, asked_step: int, steps: int) -> int:
    """Walk some steps; one rank gets a real SIGTERM in one of them. Which step was the last?"""
    switch = StopSwitch(peers)
    switch.listen()
    step = 0
    while step < steps:
        step += 1
        if peers.rank == asked_rank and step == asked_step:
            os.kill(os.getpid(), signal.SIGTERM)
        if switch.agreed():
            break
    switch.close()
    return step


def waits(timeout_s: float) -> dict[str, Any]:
    """Rank 1 works longer than `timeout_s`, then leaves its peer alone; what does each get?"""
    open_group()
    peers = Peers(find_place(os.environ), timeout_s)

    def work() -> str:
        if peers.rank == 1:
            time.sleep(2.5 * timeout_s)
        return f"done on {peers.rank}"

    answers: dict[str, Any] = {"patiently": peers.patiently(work)}
    if peers.rank == 1:
        time.sleep(4 * timeout_s)
        return answers
    try:
        with peers.during("validating"):
            peers.gather(None)
    except GradPruneError as exc:
        answers["alone"] = f"{type(exc).__name__}: {exc}"
    return answers


def compares(facts: list[list[dict[str, Any]]]) -> list[str]:
    """Compare each rank's facts, one case after the other; what came of each?"""
    open_group()
    peers = Peers(find_place(os.environ))
    outcomes = []
    for case in facts:
        try:
            peers.check_alike(case[peers.rank])
            outcomes.append("alike")
        except RankMismatchError as exc:
            outcomes.append(str(exc).replace(socket.gethostname(), "HOST"))
    dist.destroy_process_group()
    return outcomes


def group_timeouts() -> dict[str, float]:
    """Seconds that each kind of group waits at most, after `connect`."""
    from launch.support import start

    store = dist.FileStore(os.environ["DS_TEST_STORE"], int(os.environ["WORLD_SIZE"]))
    place = find_place(os.environ)
    real = dist.init_process_group

    def from_file(backend: str, **options: Any) -> None:
        real(backend, store=store, rank=place.rank, world_size=place.world_size, **options)

    start.meet = lambda *_: store
    dist.init_process_group = from_file  # type: ignore[assignment]
    peers = start.connect(place, 7.0)
    groups = {"first": dist.group.WORLD, "later": dist.new_group([0, 1]), "ours": peers._group}
    cpu = torch.device("cpu")
    return {
        name: group._get_backend(cpu).options._timeout.total_seconds()
        for name, group in groups.items()
    }
