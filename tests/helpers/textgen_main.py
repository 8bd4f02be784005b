"""What `run_processes` runs for the tests of textgen: one rank among real ones."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_gradprune.errors import DataError, RankMismatchError
from launch.support.peers import AgreedFault, Peers, StopSwitch, find_place
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
            "speaks first": [peers.speaks_first(), peers.speaks_first()],
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


def prepares(cases: list[tuple[list[str], list[str]]], model: str) -> list[str]:
    """Prepare data, each case with a folder and a text per rank; what came of each?"""
    from textgen.prepare import prepare_everywhere

    open_group()
    peers = Peers(find_place(os.environ))
    outcomes = []
    for folders, texts in cases:
        try:
            prepare_everywhere(peers, Path(folders[peers.rank]), Path(texts[peers.rank]), model)
            outcomes.append("prepared")
        except (AgreedFault, RankMismatchError) as exc:
            outcomes.append(f"{type(exc).__name__}: {exc}")
    dist.destroy_process_group()
    return outcomes
