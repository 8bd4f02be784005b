"""Islands as processes over gloo, with `min_islands`: some are lost, and the others go on.

Nothing is started again. Counted are the bits of those that are left, after every step, and how
long their longest step took, beyond the median of all.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import GradPruneError
from ds_gradprune.train.crc import crc_of
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.crew import CrewTransport
from ds_gradprune.wire.epochs import gloo_opener
from ds_gradprune.wire.members import Members
from labs.faults.island import UpdateRank

TIMEOUT_S = 5.0
DEADLINE_S = 60.0
STEP_S = 0.01
"""Of computation."""

DEEDS = ("kill", "stop", "kill in an exchange")


@dataclass(frozen=True)
class Loss:
    """What happens to an island.

    Attributes:
        island: whose.
        step: the optimizer step under way.
        deed: "kill" or "stop" before the step; "kill in an exchange" at a random moment of it.
    """

    island: int
    step: int
    deed: str


@dataclass(frozen=True)
class Schedule:
    """One run.

    Attributes:
        seed: of what islands learn.
        islands: how many begin.
        steps: optimizer steps.
        config: the product's block.
        losses: what happens.
    """

    seed: int
    islands: int
    steps: int
    config: GradientPruningConfig
    losses: tuple[Loss, ...]


@dataclass
class Verdict:
    """How a schedule ended.

    Attributes:
        end: "finished", "typed_error", "hung" or "untyped", of those that were not to be lost.
        diverged: they had other bits after the same step.
        recover_s: the longest step of any of them beyond the median.
        exchange_s: the median step without its computation.
        notes: what they said.
    """

    end: str
    diverged: bool = False
    recover_s: float | None = None
    exchange_s: float | None = None
    notes: list[str] = field(default_factory=list)


def draw(seed: int, number: int) -> Schedule:
    """Schedule `number` of a seed."""
    chance = random.Random(f"lost/{seed}/{number}")
    islands, steps = chance.randint(2, 5), chance.randint(16, 30)
    lost = chance.sample(range(islands), k=2 if islands > 3 and chance.random() < 0.4 else 1)
    losses = tuple(
        Loss(island, chance.randint(3, steps - 3), chance.choice(DEEDS)) for island in lost
    )
    density = chance.choice([0.01, 0.05, 1.0])
    block = {
        "min_islands": 1,
        "warmup": "unpruned",
        "warmup_steps": 0,
        "ramp_steps": 0,
        "window_size": 4,
        "verify_every_steps": 1,
        "sync_every": chance.choice([1, 2]),
        "density": {"initial": density, "min": density, "max": density},
        "residual": chance.choice(["used", "reset"]),
    }
    config = GradientPruningConfig.model_validate(block)
    return Schedule(chance.randrange(2**31), islands, steps, config, losses)


def play(schedule: Schedule) -> Verdict:
    """Run a schedule to its end; the store lies in this process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    # Not from this process: a store of it may hold a lock in the moment of the fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ends, processes = [], []
    for island in range(schedule.islands):
        mine, other = context.Pipe(duplex=False)
        process = context.Process(target=_island, args=(schedule, island, store.port, other))
        process.start()
        other.close()
        ends.append(mine)
        processes.append(process)
    lost = {loss.island for loss in schedule.losses}
    deadline_s = time.monotonic() + DEADLINE_S
    told: dict[int, dict[str, Any]] = {}
    for island, end in enumerate(ends):
        if island not in lost and end.poll(max(0.1, deadline_s - time.monotonic())):
            told[island] = end.recv()
    for process in processes:
        process.kill()
        process.join()
    return _judge(schedule, [told.get(i) for i in range(schedule.islands) if i not in lost])


def _judge(schedule: Schedule, told: list[dict[str, Any] | None]) -> Verdict:
    if any(one is None for one in told):
        return Verdict("hung", notes=[f"{sum(one is None for one in told)} islands"])
    known = [one for one in told if one is not None]
    faults = [one["fault"] for one in known if one["fault"]]
    if faults:
        typed = all(one["typed"] for one in known if one["fault"])
        return Verdict("typed_error" if typed else "untyped", notes=faults)
    diverged = any(one["crcs"] != known[0]["crcs"] for one in known)
    seconds = [statistics.median(one["seconds"]) for one in known]
    longest = max(max(one["seconds"]) - median for one, median in zip(known, seconds, strict=True))
    usual_s = statistics.mean(seconds) - STEP_S
    return Verdict("finished", diverged, round(longest, 3), round(usual_s, 4))


def _island(schedule: Schedule, island: int, port: int, end: Any) -> None:
    """The process of an island."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"crcs": [], "seconds": [], "fault": "", "typed": True}
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
        opens = gloo_opener(store, island, TIMEOUT_S)
        members = Members(store, island, opens, TIMEOUT_S, schedule.config.min_islands or 1)
        members.begin(range(schedule.islands))
        crew = CrewTransport(members)
        rank = UpdateRank(schedule.config, AllGather(crew), schedule.seed, hides=False)
        _walk(schedule, island, rank, found)
        crew.leave()
    except GradPruneError as exc:
        found["fault"] = f"{type(exc).__name__}: {exc}"
    except Exception as exc:
        found |= {"fault": f"{type(exc).__name__}: {exc}", "typed": False}
    end.send(found)
    time.sleep(DEADLINE_S)  # until it is killed: others may still be at work


def _walk(schedule: Schedule, island: int, rank: UpdateRank, found: dict[str, Any]) -> None:
    losses = {loss.step: loss.deed for loss in schedule.losses if loss.island == island}
    chance = random.Random(f"{schedule.seed}/{island}")
    while rank.loop.step < schedule.steps:
        deed = losses.get(rank.loop.exchange_step)
        if deed == "kill in an exchange":
            after_s = STEP_S + chance.uniform(0.0, 0.01)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process
            signal.setitimer(signal.ITIMER_REAL, after_s)
        elif deed is not None:
            os.kill(os.getpid(), signal.SIGKILL if deed == "kill" else signal.SIGSTOP)
        began_s = time.monotonic()
        time.sleep(STEP_S)
        rank.step()
        found["seconds"].append(time.monotonic() - began_s)
        found["crcs"].append(crc_of(rank.agreed()))
