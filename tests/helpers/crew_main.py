"""Islands as processes of which some are killed, frozen or slow while they make calls."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.errors import GradPruneError
from ds_gradprune.wire.crew import CrewTransport
from ds_gradprune.wire.epochs import gloo_opener
from ds_gradprune.wire.members import Members
from launch.support.run_folder import write_text

TIMEOUT_S = 4.0


def count_on(port: int, lost: int, how: str, calls: int = 40) -> dict[str, Any]:
    """Gather and sum; one island is gone from call 20 on."""
    island, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    members = Members(store, island, gloo_opener(store, island, TIMEOUT_S), TIMEOUT_S)
    members.begin(range(size))
    crew = CrewTransport(members)
    told: dict[str, Any] = {"rows": [], "longest_s": 0.0}
    try:
        for call in range(calls):
            if call == 20 and island == lost:
                if how == "killed":
                    return told  # and the process ends
                _freeze(8.0)
            began_s = time.monotonic()
            told["rows"].append(_gathered(crew, call, island))
            told["longest_s"] = max(told["longest_s"], time.monotonic() - began_s)
            total = torch.full((300_000,), float(10**island))
            crew.all_reduce(total)
            told["rows"].append([int(total[0]), int(total[-1])])
    except GradPruneError as exc:
        told["fault"] = f"{type(exc).__name__}: {exc}"
    told["took_part"] = list(crew.took_part)
    return told


def walk(address: str, island: int, size: int, folder: Path) -> None:
    """Make calls until the folder has a file `stop`; write down what came, and how long it took."""
    store = dist.TCPStore(address, 29500, is_master=island == 0, wait_for_workers=False)  # type: ignore[attr-defined]
    members = Members(store, island, gloo_opener(store, island, TIMEOUT_S), TIMEOUT_S)
    members.begin(range(size))
    crew = CrewTransport(members)
    told: dict[str, Any] = {"calls": 0, "longest_s": 0.0, "fault": ""}
    try:
        while not (folder / "stop").exists():
            began_s = time.monotonic()
            _gathered(crew, told["calls"] % 256, island)
            told["longest_s"] = max(told["longest_s"], time.monotonic() - began_s)
            told |= {"calls": told["calls"] + 1, "took_part": list(crew.took_part)}
            write_text(folder / f"told{island}", json.dumps(told))
            time.sleep(0.02)
    except GradPruneError as exc:
        told["fault"] = f"{type(exc).__name__}: {exc}"
    write_text(folder / f"told{island}", json.dumps(told))
    os._exit(0)


def _freeze(for_s: float) -> None:
    """All threads of this process, until another one lets it go on."""
    me = os.getpid()
    if not os.fork():
        time.sleep(for_s)
        os.kill(me, signal.SIGCONT)
        os._exit(0)
    os.kill(me, signal.SIGSTOP)


def _gathered(crew: CrewTransport, call: int, island: int) -> list[int]:
    out = torch.zeros(crew.world_size, 2, dtype=torch.uint8)
    work = crew.start_all_gather(torch.tensor([call, island], dtype=torch.uint8), out)
    work.wait()
    assert work.took_part is not None
    return [int(value) for value in out[: len(work.took_part)].flatten()]


if __name__ == "__main__":
    walk(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
