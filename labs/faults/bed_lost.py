"""Islands that are lost on the bed, with `min_islands`: a cable, a direction, a process, by hand.

Three hosts are an island each, of one rank or several, and nothing is started again. Who can still
be reached must train on to the end. Who was lost must end typed, if its process lives.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path

from labs.faults.bed import LIMIT_S, BareRun, BedVerdict
from labs.faults.bed_schedule import LASTING, TIMEOUT_S, BedSchedule
from tools.netbed import Bed

HOSTS, STEPS = 3, 120
DEEDS = ("down", "one way", "kill", "stop", "outage", "one way for a while")
ENDS_S = 45.0
"""A lost rank that lives has said so by then, however late it finds out."""


def draw(seed: int, number: int, ranks: int = 1) -> BedSchedule:
    """Schedule `number` of a seed; the deeds take turns. So many ranks are on each host."""
    chance = random.Random(f"bed lost {seed}/{number}")
    return BedSchedule(
        hosts=HOSTS,
        mode="lost",
        rate=chance.choice(["20mbit", "100mbit", "1gbit"]),
        supervised=False,
        deed=DEEDS[number % len(DEEDS)],
        host=chance.randrange(HOSTS),
        step=chance.randint(15, 40),
        for_s=chance.uniform(2.0, TIMEOUT_S / 2),
        steps=STEPS,
        ranks=ranks,
    )


def left(schedule: BedSchedule) -> set[int]:
    """The hosts that must go on. Pure.

    Host 0 keeps the store, over which the others agree. Who does not reach it ends.
    """
    victim, other = schedule.host, (schedule.host + 1) % schedule.hosts
    everybody = set(range(schedule.hosts))
    if schedule.deed not in LASTING:
        return everybody
    if schedule.deed == "one way":  # of two that live the one with the higher number leaves
        return everybody - {max(victim, other)}
    if schedule.deed == "down" and victim == 0:
        return {0}
    return everybody - {victim}


def ranks_on(hosts: set[int], schedule: BedSchedule) -> set[int]:
    """All ranks of some hosts. Pure."""
    return {rank for host in hosts for rank in schedule.ranks_of(host)}


def play(schedule: BedSchedule, inputs: Path, folder: Path) -> BedVerdict:
    """Run a schedule to its end."""
    with Bed(schedule.hosts, schedule.rate) as bed:
        run = _LostRun(schedule, bed, inputs, folder)
        try:
            return run.play()
        finally:
            run.close()


class _LostRun(BareRun):
    def play(self) -> BedVerdict:
        schedule = self.schedule
        if fault := self.begin():
            return fault
        seen = self._watch_log(began_s=time.monotonic())
        expected = ranks_on(left(schedule), schedule)
        codes = [process.poll() for process in self.processes]
        is_frozen = schedule.deed == "stop"
        done = {rank for rank, code in enumerate(codes) if code == 0}
        told = self.told()
        notes = [f"codes {codes}", *told]
        if any(codes[rank] is None for rank in expected):
            return BedVerdict("hung", notes=notes)
        gone = {schedule.victim} if schedule.deed in ("kill", "stop") else set()
        lost = set(range(schedule.world_size)) - expected - gone
        tells = {rank // schedule.ranks for rank in lost if "error: " in told[rank]}
        is_typed = all(codes[r] == 2 and r // schedule.ranks in tells for r in lost)
        if done != expected or not is_typed or any("Traceback" in text for text in told):
            return BedVerdict("untyped", notes=notes)
        if torn := self.whole():
            return BedVerdict("untyped", notes=[torn, *notes])
        assert is_frozen or all(code is not None for code in codes)
        return BedVerdict("finished", recover_s=seen)

    def _watch_log(self, began_s: float) -> float | None:
        """Do the deed, wait for all ends, and return the longest time between two steps."""
        self.do()
        times = [(self.logged(), self.deed_s)]
        frozen = {self.schedule.victim} if self.schedule.deed == "stop" else set()
        alive = [p for rank, p in enumerate(self.processes) if rank not in frozen]
        expected = [self.processes[r] for r in ranks_on(left(self.schedule), self.schedule)]
        deadline_s, over_s = time.monotonic() + LIMIT_S, None
        while any(process.poll() is None for process in alive):
            now_s = time.monotonic()
            step = self.logged()
            if step > times[-1][0]:
                times.append((step, now_s))
            if over_s is None and all(process.poll() is not None for process in expected):
                over_s = now_s
            if now_s > deadline_s or (over_s is not None and now_s > over_s + ENDS_S):
                break
            time.sleep(0.05)
        gaps = [later - earlier for (_, earlier), (_, later) in itertools.pairwise(times)]
        return round(max(gaps), 2) if gaps else None

    def whole(self) -> str:
        """As for any run; a step may have been logged by another rank."""
        lines = (self.out / "log.jsonl").read_text().splitlines()
        logged = [json.loads(line)["step"] for line in lines]
        expected = list(range(1, self.schedule.steps + 1))
        return "" if logged == expected else f"logged {logged[:3]} to {logged[-3:]}: {len(logged)}"
