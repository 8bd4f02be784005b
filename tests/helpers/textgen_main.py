"""What `run_processes` runs for the tests of textgen: one rank among real ones."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_gradprune.errors import DataError, GradPruneError, RankMismatchError
from ds_gradprune.textgen.prepare import prepare_everywhere
from ds_gradprune.textgen.ranks import AgreedFault, Peers, StopSwitch, find_place
from tests.helpers.process_main import open_group


def agreements() -> dict[str, Any]:
    """Everything `Peers` promises, asked once."""
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
            "speaks first": [peers.speaks_first(), peers.speaks_first()],
        }
    finally:
        peers.gather(None)
        dist.destroy_process_group()


def stops(asked_rank: int | None, asked_step: int, steps: int) -> list[int]:
    """Walk some steps; one rank gets a real SIGTERM in one of them. Which step was the last?"""
    open_group()
    peers = Peers(find_place(os.environ))
    ends = []
    for _ in range(2):  # a switch leaves nothing behind that hinders the next one
        switch = StopSwitch(peers)
        switch.listen()
        last = 0
        while last < steps:
            last += 1
            if peers.rank == asked_rank and last == asked_step:
                os.kill(os.getpid(), signal.SIGTERM)
            if switch.agreed():
                break
        switch.close()
        ends.append(last)
    dist.destroy_process_group()
    return ends


def prepares(folders: list[str], texts: list[str], model: str) -> str:
    """Prepare data with a folder and a text per rank; what came of it?"""
    open_group()
    peers = Peers(find_place(os.environ))
    try:
        prepare_everywhere(peers, Path(folders[peers.rank]), Path(texts[peers.rank]), model)
    except (AgreedFault, RankMismatchError) as exc:
        return f"{type(exc).__name__}: {exc}"
    except GradPruneError as exc:
        return f"unexpected {type(exc).__name__}: {exc}"
    finally:
        dist.destroy_process_group()
    return "prepared"
