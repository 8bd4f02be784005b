"""Plays a schedule on loopback: ranks as threads, checkpoints on the disk, life after life."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ds_gradprune.deepspeed import checkpoint, statefile
from ds_gradprune.deepspeed.agree import check_weights
from ds_gradprune.deepspeed.checkpoint import Seat
from ds_gradprune.errors import GradPruneError
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.loopback import LoopbackHub
from ds_gradprune.wire.owner_reduce import OwnerReduce
from labs.faults.ranks import GradientRank, Rank, UpdateRank, check_finite, crc
from labs.faults.schedules import LIVES, Event, Schedule
from labs.faults.transport import FaultyTransport, Gone
from launch.support.whole import candidates, fault_of, name_latest

TIMEOUT_S = 1.0
"""Of the hub: a frozen rank is found after so long."""

DEADLINE_S = 30.0
"""A rank that has not ended by then hangs: ten times what the waits of a life may add up to."""

CALLS = ("kill", "stop", "delay", "corrupt sent", "corrupt received")


@dataclass
class Life:
    """How one start of a run ended.

    Attributes:
        ends: of every rank: "done", "typed", "gone", "untyped" or "hung".
        told: of every rank: what it said at its end.
        crcs: of every rank: (step, hash of what must be equal).
        ranks: the ranks that are done.
    """

    ends: list[str]
    told: list[str]
    crcs: list[dict[int, int]]
    ranks: list[Rank | None] = field(default_factory=list)


@dataclass
class Verdict:
    """How a schedule ended.

    Attributes:
        end: "finished", "typed_error", "hung" or "untyped".
        diverged: ranks disagree, or a resumed run ended with other bits than an unbroken one.
        lost_gradient: what was put in is not what came out and what is still owed.
        lives: starts of the run.
        notes: what every life ended with, for people.
    """

    end: str
    diverged: bool = False
    lost_gradient: bool = False
    lives: int = 0
    notes: list[str] = field(default_factory=list)


def play(schedule: Schedule, folder: Path) -> Verdict:
    """Run a schedule to its end, in a folder of its own."""
    verdict = Verdict("typed_error")
    for life in range(LIVES):
        events = [event for event in schedule.events if event.life == life]
        tag = _newest(folder, events, schedule, verdict)
        found = _live(schedule, folder, events, tag, life)
        verdict.lives += 1
        counted = Counter(found.ends)
        told = next((t for t, end in zip(found.told, found.ends, strict=True) if end != "done"), "")
        verdict.notes.append(f"{dict(counted)} from {tag}: {told[:200]}")
        verdict.diverged |= _disagree(found, schedule)
        for end in ("hung", "untyped"):
            if counted[end]:
                verdict.end = end
                return verdict
        if counted["done"] == schedule.ranks:
            verdict.end = "finished"
            _judge(schedule, found, verdict)
            return verdict
        if not schedule.resumes:
            return verdict
    return verdict


# ---- the end -------------------------------------------------------------------------------------


def _judge(schedule: Schedule, life: Life, verdict: Verdict) -> None:
    """Conservation over the whole run, and the bits of an unbroken one."""
    ranks = [rank for rank in life.ranks if rank is not None]
    if any(event.kind == "foreign" for event in schedule.events):
        return  # a flipped bit of the weights is no gradient
    balances = [rank.balance() for rank in ranks]
    put_in = torch.stack([balance[0] for balance in balances]).sum(0)
    bound = sum(balance[2] for balance in balances)
    off = float((put_in - balances[0][1]).abs().max())
    if not off <= bound:
        verdict.lost_gradient = True
        verdict.notes.append(f"off by {off:.3g}, rounding explains {bound:.3g}")
    if verdict.lives > 1 and _is_repeatable(schedule):
        plain = _live(schedule, None, [], None, 0).ranks[0]
        assert plain is not None
        if crc(plain.agreed()) != crc(ranks[0].agreed()):
            verdict.diverged = True
            verdict.notes.append("other bits than the unbroken run")


def _is_repeatable(schedule: Schedule) -> bool:
    """Measured times decide nothing, and every fault ended its life or changed nothing.

    A nan in a gradient costs that step's gradient, on all ranks alike, and is no fault of the run.
    """
    density = schedule.config.density
    poisons = schedule.config.prune == "gradient"
    is_poisoned = poisons and any(event.kind == "nan" for event in schedule.events)
    return density.min == density.max and not is_poisoned


def _disagree(life: Life, schedule: Schedule) -> bool:
    """Ranks had other bits after the same step, and did not find it."""
    if any(event.kind == "foreign" for event in schedule.events):
        # One rank was made to differ. Whether it was found is all that counts.
        last = [max(crcs.items(), default=(0, 0)) for crcs in life.crcs]
        return "done" in life.ends and len(set(last)) > 1 and _had_time(life, schedule)
    steps = {step for crcs in life.crcs for step in crcs}
    return any(len({crcs[step] for crcs in life.crcs if step in crcs}) > 1 for step in steps)


def _had_time(life: Life, schedule: Schedule) -> bool:
    """Two verifications have passed between the flipped bit and the end of the run."""
    every = schedule.config.verify_every_steps or 1
    sync_every = schedule.config.sync_every if schedule.config.prune == "update" else 1
    window = 2 * max(every, sync_every) + 2 * sync_every
    return any(
        event.kind == "foreign" and event.step <= schedule.steps - window
        for event in schedule.events
    )


# ---- one life ------------------------------------------------------------------------------------


def _newest(folder: Path, events: list[Event], schedule: Schedule, verdict: Verdict) -> str | None:
    """The checkpoint to go on from: the newest that is whole, as launch/supervise.py finds it."""
    found = list(candidates(folder))
    if found and any(event.kind == "flip" for event in events):
        chance = random.Random(schedule.seed)
        path = chance.choice(sorted((folder / found[0]).glob("*.pt")))
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        if fault_of(folder / found[0]) is None and not _refused(path):
            verdict.end = "untyped"
            verdict.notes.append(f"a flipped bit of {path} was not found")
    for tag in found:
        files = sorted((folder / tag).glob("*.pt"))
        if fault_of(folder / tag) is None and not any(_refused(path) for path in files):
            name_latest(folder, tag)
            return tag
    return None


def _refused(path: Path) -> bool:
    try:
        statefile.read(str(path))
    except GradPruneError:
        return True
    return False


def _live(
    schedule: Schedule, folder: Path | None, events: list[Event], tag: str | None, life: int
) -> Life:
    """One start of the run; without a folder nothing is saved."""
    hubs = LoopbackHub(schedule.ranks, TIMEOUT_S), LoopbackHub(schedule.ranks, TIMEOUT_S)
    over = threading.Event()
    found = Life(
        ["hung"] * schedule.ranks,
        [""] * schedule.ranks,
        [{} for _ in range(schedule.ranks)],
        [None] * schedule.ranks,
    )

    def main(number: int) -> None:
        chance = random.Random(f"{schedule.seed}/{life}/{number}")
        transport = FaultyTransport(hubs[0], number, chance, over)
        mine = [event for event in events if event.rank == number]
        seat = Seat(hubs[1].transport(number), number, schedule.ranks)
        try:
            rank = _make(schedule, transport)
            _walk(schedule, rank, transport, seat, folder, tag, mine, found.crcs[number])
            found.ranks[number], found.ends[number] = rank, "done"
        except GradPruneError as exc:
            found.ends[number], found.told[number] = "typed", f"{type(exc).__name__}: {exc}"
        except Gone as exc:
            found.ends[number], found.told[number] = "gone", str(exc)
        except BaseException as exc:
            found.ends[number], found.told[number] = "untyped", f"{type(exc).__name__}: {exc}"
        for hub in hubs:  # its process has ended, and its connections with it
            if found.ends[number] != "done":
                hub.abort()

    threads = [
        threading.Thread(target=main, args=(number,), daemon=True)
        for number in range(schedule.ranks)
    ]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + DEADLINE_S
    frozen = {event.rank for event in events if event.kind == "stop"}
    for number, thread in enumerate(threads):
        if number not in frozen:
            thread.join(max(0.0, deadline_s - time.monotonic()))
    over.set()
    for thread in threads:
        thread.join(max(0.1, deadline_s - time.monotonic()))
    return found


def _make(schedule: Schedule, transport: FaultyTransport) -> Rank:
    config = schedule.config
    channel = (OwnerReduce if config.exchange == "owner_reduce" else AllGather)(transport)
    if config.prune == "gradient":
        return GradientRank(config, channel, schedule.seed)
    return UpdateRank(config, channel, schedule.seed, hides=schedule.hides)


def _walk(
    schedule: Schedule,
    rank: Rank,
    transport: FaultyTransport,
    seat: Seat,
    folder: Path | None,
    tag: str | None,
    events: list[Event],
    crcs: dict[int, int],
) -> None:
    """From the checkpoint to the last step."""
    if tag is not None:
        assert folder is not None
        loaded = checkpoint.load(str(folder), tag, seat)
        assert loaded is not None
        first = statefile.read(loaded.paths[0, 0])[0]["pruning"]
        rank.load(loaded.state, first)
    events = list(events)
    while rank.loop.step < schedule.steps:
        step = rank.loop.exchange_step
        here = [event for event in events if event.step == step]
        events = [event for event in events if event.step != step]
        _strike(rank, here)
        transport.begin({event.call: event.kind for event in here if event.kind in CALLS})
        rank.step(spoil=any(event.kind == "nan" for event in here))
        done = rank.loop.step
        if done == schedule.steps or done % schedule.save_every == 0:
            rank.settle()
            if folder is not None:
                _save(rank, seat, folder, done, any(event.kind == "full disk" for event in here))
        crcs[done] = crc(rank.agreed())


def _strike(rank: Rank, events: list[Event]) -> None:
    """What happens before a step."""
    for event in events:
        if event.kind == "raise":
            raise Gone("an error of its own")
        if event.kind == "behind" and rank.loop.last_exchange:
            rank.loop.step -= 1
            rank.loop.last_exchange -= 1
        if event.kind == "foreign":
            rank.agreed()[0].view(torch.int32)[3] ^= 1


def _save(rank: Rank, seat: Seat, folder: Path, step: int, is_full: bool) -> None:
    """As launch/train.py saves: finite on all ranks, all files, then the name of the newest."""
    fault: GradPruneError | None = None
    try:
        check_finite(rank, step)
    except GradPruneError as exc:
        fault = exc
    checkpoint.agree_on(fault, seat)
    check_weights(seat.transport, seat.shard, crc(rank.agreed()), step)
    tag = f"step{step:08d}"
    if is_full:  # what is written into this device is always too much
        path = Path(checkpoint.state_path(str(folder), tag, seat.island, seat.shard) + ".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.symlink_to("/dev/full")
    checkpoint.save(str(folder), tag, seat, _cloned(rank.state()), step)
    if seat.is_first:
        name_latest(folder, tag)


def _cloned(value: Any) -> Any:
    """A copy with memory of its own: threads of one process must not share tensors."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _cloned(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cloned(inner) for inner in value)
    return value
