"""Plays a schedule on loopback: ranks as threads, checkpoints on the disk, life after life."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from ds_gradprune.deepspeed import checkpoint, statefile
from ds_gradprune.deepspeed.agree import check_weights
from ds_gradprune.deepspeed.checkpoint import Seat
from ds_gradprune.errors import GradPruneError
from ds_gradprune.train.crc import crc_of
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.loopback import LoopbackHub
from ds_gradprune.wire.owner_reduce import OwnerReduce
from labs.faults.gradient import GradientRank
from labs.faults.island import UpdateRank
from labs.faults.rank import Rank, check_finite
from labs.faults.schedules import LIVES, Event, Schedule
from labs.faults.transport import FaultyTransport, Gone
from labs.faults.verdict import Life, Verdict, disagree, judge
from launch.support.whole import candidates, fault_of, name_latest

TIMEOUT_S = 1.0
"""Of the hub: a frozen rank is found after so long."""

DEADLINE_S = 30.0
"""A rank that has not ended by then hangs: ten times what the waits of a life may add up to."""

CALLS = ("kill", "stop", "delay", "corrupt sent", "corrupt received")


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
        verdict.diverged |= disagree(found, schedule)
        for end in ("hung", "untyped"):
            if counted[end]:
                verdict.end = end
                return verdict
        if counted["done"] == schedule.ranks:
            verdict.end = "finished"
            judge(schedule, found, verdict, lambda: _live(schedule, None, [], None, 0))
            return verdict
        if not schedule.resumes:
            return verdict
    return verdict


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
        _load(rank, seat, folder, tag)
    events, made = list(events), rank.loop.step  # its own count may be made to be behind
    while rank.loop.step < schedule.steps:
        step = rank.loop.exchange_step
        here = {event.kind: event for event in events if event.step == step}
        events = [event for event in events if event.step != step]
        _strike(rank, here)
        transport.begin({here[kind].call: kind for kind in CALLS if kind in here})
        rank.step(spoil="nan" in here)
        done = rank.loop.step
        if done == schedule.steps or done % schedule.save_every == 0:
            rank.settle()
            if folder is not None:
                _save(rank, seat, folder, done, "full disk" in here)
        made += 1
        crcs[made] = crc_of(rank.agreed())


def _load(rank: Rank, seat: Seat, folder: Path, tag: str) -> None:
    loaded = checkpoint.load(str(folder), tag, seat)
    assert loaded is not None
    first = statefile.read(loaded.paths[0, 0])[0]["pruning"]
    rank.load(loaded.state, first)


def _strike(rank: Rank, events: Collection[str]) -> None:
    """What happens before a step."""
    if "raise" in events:
        raise Gone("an error of its own")
    if "behind" in events and rank.loop.last_exchange:
        rank.loop.step -= 1
        rank.loop.last_exchange -= 1
    if "foreign" in events:
        rank.agreed()[0].view(torch.int32)[3] ^= 1


def _save(rank: Rank, seat: Seat, folder: Path, step: int, is_full: bool) -> None:
    """As launch/train.py saves: finite on all ranks, all files, then the name of the newest."""
    fault: GradPruneError | None = None
    try:
        check_finite(rank, step)
    except GradPruneError as exc:
        fault = exc
    checkpoint.agree_on(fault, seat)
    check_weights(seat.transport, seat.shard, crc_of(rank.agreed()), step)
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
