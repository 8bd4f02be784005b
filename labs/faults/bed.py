"""Plays schedules on a bed of hosts: real processes, shaped links, launch/train.py, and a deed.

Supervised runs are started by launch/supervise.py on the first host, and must finish. Bare ones are
started rank by rank, and every rank that lives must end with one typed line in time, or finish.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labs.faults.bed_schedule import LASTING, BedSchedule
from tools.netbed import Bed

ROOT = Path(__file__).resolve().parents[2]
HUNG_S = 60.0
"""A bare rank that has not ended so long after the deed hangs: the machine's cores are shared by
all hosts, and a start alone may take half of it."""

STACK = ("frame #", "Exception raised from", "<omitting")
"""Lines of a stack that torch prints with its warnings begin so."""

LIMIT_S = 240.0
"""Of a whole schedule."""


@dataclass
class BedVerdict:
    """How it ended.

    Attributes:
        end: "finished", "typed_error", "hung" or "untyped".
        recover_s: from the deed, or its end if it passes, to the next step; None: there was none.
        typed_s: from the deed to the end of the last bare rank.
        notes: what was told, for people.
    """

    end: str
    recover_s: float | None = None
    typed_s: float | None = None
    notes: list[str] = field(default_factory=list)


def play(schedule: BedSchedule, inputs: Path, folder: Path) -> BedVerdict:
    """Run a schedule to its end."""
    with Bed(schedule.hosts, schedule.rate) as bed:
        run = (_Supervised if schedule.supervised else BareRun)(schedule, bed, inputs, folder)
        try:
            return run.play()
        finally:
            run.close()


class _Run:
    """One run under way."""

    def __init__(self, schedule: BedSchedule, bed: Bed, inputs: Path, folder: Path) -> None:
        self.schedule, self.bed, self.folder = schedule, bed, folder
        self.out = folder / "out"
        self.began_s = time.monotonic()
        self.deed_s = self.over_s = 0.0
        self.words = [
            *("launch/train.py", "--config", str(inputs / f"{schedule.mode}.json")),
            *("--model", str(inputs / "model"), "--text", str(inputs / "text.txt")),
            *("--steps", str(schedule.steps), "--eval-every", "100000", "--save-every", "10"),
            *("--out", str(self.out)),
        ]
        self.processes: list[subprocess.Popen[Any]] = []

    def logged(self) -> int:
        """The last step in the run's log."""
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
            line = (self.out / "log.jsonl").read_text().splitlines()[-1]
            return int(json.loads(line)["step"])
        return 0

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def until(self, holds: Callable[[], bool], limit_s: float) -> bool:
        """Whether something held before the time was up, or all processes had ended."""
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            if holds():
                return True
            if self.ended():
                return holds()
            time.sleep(0.05)
        return False

    def pid(self, host: int) -> int:
        """The rank's process number on its host."""
        raise NotImplementedError

    def do(self) -> None:
        """The deed, and its end if it passes."""
        schedule, bed = self.schedule, self.bed
        host, deed = bed.hosts[schedule.host], schedule.deed
        other = bed.hosts[(schedule.host + 1) % schedule.hosts]
        false = ("ip", "neigh", "replace", other.address, "lladdr", "02:00:00:00:00:99")
        self.deed_s = time.monotonic()
        if deed in ("kill", "stop"):
            number = {"kill": "-KILL", "stop": "-STOP"}[deed]
            host.run(["kill", number, str(self.pid(schedule.host))], check=True)
        elif deed in ("down", "outage"):
            host.set_link(up=False)
        elif deed.startswith("one way"):
            host.space.call(*false, "dev", "eth0", "nud", "permanent")
        else:
            bed.set_rate("1mbit", schedule.host)
        if deed not in LASTING:
            time.sleep(schedule.for_s)
            if deed == "outage":
                host.set_link(up=True)
            elif deed == "rate":
                bed.set_rate(schedule.rate, schedule.host)
            else:
                host.space.call("ip", "neigh", "del", other.address, "dev", "eth0")
        self.over_s = time.monotonic()

    def whole(self) -> str:
        """What is wrong with a run that says it has finished; empty: nothing."""
        try:
            steps = json.loads((self.out / "result.json").read_text())["steps"]
            lines = (self.out / "log.jsonl").read_text().splitlines()
            logged = [json.loads(line)["step"] for line in lines]
        except (OSError, ValueError, KeyError) as exc:
            return f"{type(exc).__name__}: {exc}"
        expected = list(range(1, self.schedule.steps + 1))
        return "" if steps == expected[-1] and logged == expected else f"logged {logged[-5:]}"

    def close(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


class _Supervised(_Run):
    def play(self) -> BedVerdict:
        schedule = self.schedule
        log = self.folder / "events.jsonl"
        words = [sys.executable, "launch/supervise.py", "--hostfile", str(self.bed.hostfile)]
        with (self.folder / "told.txt").open("wb") as told:
            self.processes.append(
                self.bed.hosts[0].popen(
                    [*words, "--log", str(log), "--host-timeout", "8", "--", *self.words],
                    cwd=ROOT,
                    env=self.bed.environ(DS_ACCELERATOR="cpu"),
                    stdout=told,
                    stderr=told,
                )
            )
        if not self.until(lambda: self.logged() >= schedule.step, LIMIT_S / 2):
            return BedVerdict("untyped", notes=[f"never reached step {schedule.step}", self.told()])
        before, begun = self.logged(), len(self.starts())
        self.do()
        recovered = self.until(lambda: self._has_recovered(before, begun), LIMIT_S / 2)
        recover_s = time.monotonic() - (self.deed_s if schedule.deed in LASTING else self.over_s)
        ended = self.until(self.ended, max(1.0, LIMIT_S + self.began_s - time.monotonic()))
        notes = [self.told()]
        if not ended:
            return BedVerdict("hung", notes=notes)
        code, fault = self.processes[0].returncode, self.whole()
        if code or fault:
            return BedVerdict("typed_error" if code == 2 else "untyped", notes=[fault, *notes])
        return BedVerdict("finished", recover_s if recovered else None, notes=notes)

    def _has_recovered(self, before: int, begun: int) -> bool:
        """A step was made after the deed: by the next attempt, or by this one where it lives on."""
        events, starts = self.events(), self.starts()
        if len(starts) == begun:
            return self.schedule.deed not in LASTING and self.logged() > before + 1
        tags = [event["tag"] for event in events if event["event"] == "checkpoint"]
        resumed = int(tags[-1].removeprefix("step")) if tags else 0
        with contextlib.suppress(OSError):  # the log is cut to that step first, then it grows
            written_s = (self.out / "log.jsonl").stat().st_mtime
            return written_s > _seconds(starts[-1]) and self.logged() > resumed
        return False

    def starts(self) -> list[dict[str, Any]]:
        """All attempts so far."""
        return [event for event in self.events() if event["event"] == "started"]

    def events(self) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):
            lines = (self.folder / "events.jsonl").read_text().splitlines()
            return [json.loads(line) for line in lines]
        return []

    def pid(self, host: int) -> int:
        name = self.bed.hosts[host].name
        started = [e for e in self.events() if e["event"] == "ranks" and e["host"] == name]
        return int(started[-1]["pids"][0])

    def told(self) -> str:
        """The supervisor's own lines."""
        shown = [
            ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "on", "words"))
            for event in self.events()
        ]
        return "; ".join(shown)


class BareRun(_Run):
    """A run that is started rank by rank, and that nothing starts again."""

    def play(self) -> BedVerdict:
        """Run it to its end."""
        schedule = self.schedule
        if fault := self.begin():
            return fault
        before = self.logged()
        self.do()
        if schedule.deed not in LASTING:
            went_on = self.until(lambda: self.logged() > before + 1, HUNG_S)
            recover_s = time.monotonic() - self.over_s
            if went_on and self.until(self.ended, LIMIT_S) and not self.whole():
                return BedVerdict("finished", recover_s)
        return self._survivors()

    def begin(self) -> BedVerdict | None:
        """Start all ranks, and wait for the step of the deed; what went wrong, if it did."""
        for number in range(self.schedule.world_size):
            self.start(number)
        if self.until(lambda: self.logged() >= self.schedule.step, LIMIT_S / 2):
            return None
        return BedVerdict("untyped", notes=["never began", *self.told()])

    def start(self, number: int) -> None:
        """Start a rank."""
        schedule = self.schedule
        host, local_rank = divmod(number, schedule.ranks)
        place = {"RANK": str(number), "WORLD_SIZE": str(schedule.world_size)}
        place |= {"LOCAL_RANK": str(local_rank), "LOCAL_SIZE": str(schedule.ranks)}
        place |= {"MASTER_ADDR": self.bed.hosts[0].address}
        place |= {"MASTER_PORT": "29500", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        words = ["sh", "-c", 'echo $$ > "$0"; exec "$@"', str(self.folder / f"pid{number}")]
        with (self.folder / f"told{number}.txt").open("wb") as told:
            self.processes.append(
                self.bed.hosts[host].popen(
                    [*words, sys.executable, *self.words],
                    cwd=ROOT,
                    env=self.bed.environ() | place,
                    stdout=told,
                    stderr=told,
                )
            )

    def _survivors(self) -> BedVerdict:
        """All that live must end, with one typed line each at most and no traceback."""
        schedule = self.schedule
        victim = schedule.victim if schedule.deed in ("kill", "stop") else None
        alive = [i for i in range(schedule.world_size) if i != victim]
        processes = [self.processes[i] for i in alive]
        ended = self.until(lambda: all(p.poll() is not None for p in processes), HUNG_S)
        typed_s = time.monotonic() - self.deed_s
        notes = self.told()
        if not ended:
            return BedVerdict("hung", typed_s=typed_s, notes=notes)
        is_typed = all(
            self.processes[i].returncode == 2 and "Traceback" not in notes[i] for i in alive
        ) and any("error: " in notes[i] for i in alive)
        return BedVerdict("typed_error" if is_typed else "untyped", typed_s=typed_s, notes=notes)

    def pid(self, host: int) -> int:
        """See `_Run`."""
        return int((self.folder / f"pid{self.schedule.victim}").read_text())

    def told(self) -> list[str]:
        """What every rank wrote at last, without the frames of torch's stacks."""
        texts = [
            (self.folder / f"told{number}.txt").read_text(errors="replace")
            for number in range(self.schedule.world_size)
        ]
        return [
            "\n".join(line for line in text.splitlines() if not line.startswith(STACK))[-600:]
            for text in texts
        ]


def _seconds(event: dict[str, Any]) -> float:
    from datetime import datetime

    return datetime.fromisoformat(event["time"]).timestamp()
