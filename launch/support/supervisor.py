"""Starts a run again on the hosts that answer, from its last whole checkpoint, until it is done.

Longer than 300 lines: one run from its first attempt to its last, and what is told of it.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_gradprune.commands.hostfile import HostLine
from ds_gradprune.commands.hosts import exports
from ds_gradprune.config import BLOCK
from ds_gradprune.errors import CheckpointError, DataError, TransportTimeout

from .attempt import SIGNALLED, Attempt, Limits, Outcome
from .comebacks import FIRST_PAUSE_S, LONGEST_PAUSE_S, Comebacks
from .cut_links import Links
from .kept_host import Absent, answering, ssh_to
from .run_folder import RunFolder
from .whole import candidates, fault_of, name_latest

FRUITLESS = 3
"""So many attempts in a row that end by themselves, without a new checkpoint, are the last: what
ends them is in the command, not in the hosts."""


@dataclass(frozen=True)
class Task:
    """What is supervised.

    Attributes:
        words: the command of one rank.
        hosts: all, in the order of ranks.
        ssh: the words that reach a host, up to its name.
        ssh_is_given: the user has said so: then this host is reached so as well.
        min_hosts: that the user asks for at least.
        max_restarts: so often it is started again.
        wait_s: so long hosts that do not answer are waited for.
        rejoin_s: so often hosts that are left out are asked again; 0: never.
        limits: of an attempt.
        master_addr: address of the hostfile's first host; None: its name.
        master_port: of the first attempt; each later one takes the next.
        folder: of the run, if it is one of ours.
        checkpoints: where the file `latest` appears; None: the command knows how to go on.
        resume: words that make the command go on from there.
        log: where events are written.
        min_islands: the run goes on without lost islands while so many are left; None: it does not.
        island_ranks: see `island.ranks` of the configuration.
    """

    words: Sequence[str]
    hosts: Sequence[HostLine]
    ssh: Sequence[str]
    ssh_is_given: bool
    min_hosts: int
    max_restarts: int
    wait_s: float
    rejoin_s: float
    limits: Limits
    master_addr: str | None
    master_port: int
    folder: RunFolder | None
    checkpoints: Path | None
    resume: Sequence[str]
    log: Path
    min_islands: int | None = None
    island_ranks: int | None = None

    @property
    def least_hosts(self) -> int:
        """With fewer nothing is started: the run itself would refuse to begin."""
        if self.min_islands is None:
            return self.min_hosts
        slots, ranks = self.hosts[0].slots, self.ranks_of_an_island(self.hosts)
        return min(len(self.hosts), max(self.min_hosts, -(-ranks * self.min_islands // slots)))

    def ranks_of_an_island(self, hosts: Sequence[HostLine]) -> int:
        """As the run itself divides its ranks, started on these hosts."""
        return self.island_ranks or (hosts[0].slots if len(hosts) > 1 else 1)


class Supervisor:
    """One supervised run, from its first attempt to its last.

    Args:
        task: what is supervised.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._asked: list[int] = []
        self._is_own = task.folder is not None and task.folder.is_empty()
        self._restarts = self._starts = 0
        self._links = Links(exports(os.environ), self._note)

    def run(self) -> int:
        """Returns the exit code: that of the ranks in the last attempt.

        Raises:
            TransportTimeout: too few hosts answered in time.
            CheckpointError: there are checkpoints, and none is whole.
            DataError: the log cannot be written.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: self._asked.append(number))
        # The pause doubles while no new checkpoint is made.
        pause_s, fruitless = FIRST_PAUSE_S, 0
        while True:
            hosts = self._await_hosts()
            if self._asked:
                return SIGNALLED + self._asked[0]
            before = self._saved()
            outcome = self._attempt(hosts)
            if self._asked:
                self._note("interrupted", code=outcome.code)
                return outcome.code
            if not outcome.code and not outcome.grows:
                self._note("finished")
                return 0
            if outcome.grows and not outcome.code:
                self._starts += 1
                continue
            if self._saved() != before:
                pause_s, fruitless = FIRST_PAUSE_S, 0
            elif not outcome.lost and not outcome.killed:
                fruitless += 1
            # What ends by itself on hosts that all answer may have ended for a link between them.
            self._links.doubted |= not outcome.lost and not outcome.killed
            if self._gives_up(fruitless, outcome):
                return outcome.code
            self._restarts += 1
            self._starts += 1
            free_s = outcome.free_s - time.monotonic()
            self._note("waiting", seconds=round(max(pause_s, free_s), 1), restart=self._restarts)
            self._nap(max(pause_s, free_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _gives_up(self, fruitless: int, outcome: Outcome) -> bool:
        if fruitless >= FRUITLESS:
            why = f"{fruitless} attempts in a row ended by themselves without a new checkpoint"
        elif self._restarts >= self._task.max_restarts:
            why = f"--max-restarts {self._task.max_restarts} is used up"
        else:
            return False
        self._note("given up", why=why, code=outcome.code)
        return True

    # ---- hosts -----------------------------------------------------------------------------

    def _await_hosts(self) -> list[HostLine]:
        """The hosts that answer, at least `min_hosts`."""
        task, began_s, pause_s = self._task, time.monotonic(), FIRST_PAUSE_S
        while True:
            names = answering({host.name: self._ssh(host.name) for host in task.hosts})
            absent = [host.name for host in task.hosts if host.name not in names]
            if absent:
                self._note("absent", hosts=absent)
            names = self._links.hearing({name: self._ssh(name) for name in names})
            if len(names) >= task.least_hosts or self._asked:
                return [host for host in task.hosts if host.name in names]
            if time.monotonic() - began_s > task.wait_s:
                is_own = task.least_hosts == task.min_hosts
                asks = "--min-hosts" if is_own else f"{BLOCK}.min_islands"
                raise TransportTimeout(
                    f"{task.least_hosts} hosts must answer, and hear each other, within "
                    f"{task.wait_s:g} s, but {self._links.told(absent)}, or lower {asks}."
                )
            self._nap(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _ssh(self, name: str) -> list[str]:
        return ssh_to(name, self._task.ssh, is_given=self._task.ssh_is_given)

    # ---- one attempt -----------------------------------------------------------------------

    def _attempt(self, hosts: Sequence[HostLine]) -> Outcome:
        task = self._task
        words = [*task.words, *self._resume_words()]
        named = [host.name for host in hosts]
        self._note("started", attempt=self._starts + 1, hosts=named, words=words)
        names = [host.name for host in task.hosts if host not in hosts]
        absent = Absent(
            {name: self._ssh(name) for name in names},
            task.rejoin_s,
            self._note,
            lambda back: self._links.beside(named, back, self._ssh),
        )
        attempt = Attempt(
            {host.name: self._ssh(host.name) for host in hosts},
            [self._job(words, hosts, number) for number in range(len(hosts))],
            task.limits,
            self._note,
            lambda: len(self._asked),
            absent.are_back,
            self._comebacks(hosts),
        )
        with absent:
            outcome = attempt.run()
        self._note("stopped", code=outcome.code, lost=outcome.lost)
        return outcome

    def _comebacks(self, hosts: Sequence[HostLine]) -> Comebacks | None:
        """Islands of this attempt are started again alone, each time counted as a restart."""
        task = self._task
        if task.min_islands is None:
            return None

        def may() -> bool:
            if self._restarts >= task.max_restarts:
                return False
            self._restarts += 1
            return True

        assert task.folder is not None
        logged, before = task.folder.logged, task.folder.logged()
        every_s = task.rejoin_s or LONGEST_PAUSE_S
        ranks = task.ranks_of_an_island(hosts)
        return Comebacks(ranks * task.min_islands, lambda: logged() != before, may, every_s, ranks)

    def _job(self, words: Sequence[str], hosts: Sequence[HostLine], number: int) -> dict[str, Any]:
        """What the keeper of one host is to do."""
        task, slots = self._task, hosts[0].slots
        here = os.getcwd()
        common = exports(os.environ) | {
            "WORLD_SIZE": str(slots * len(hosts)),
            "LOCAL_SIZE": str(slots),
            "LOCAL_WORLD_SIZE": str(slots),
            "MASTER_ADDR": self._master(hosts),
            "MASTER_PORT": str(task.master_port + self._starts),
            # As DeepSpeed's launcher has it.
            "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
        }
        environs = [
            common | {"RANK": str(number * slots + local), "LOCAL_RANK": str(local)}
            for local in range(slots)
        ]
        lease_s = task.limits.host_s
        return {"words": list(words), "folder": here, "environs": environs, "lease_s": lease_s}

    def _master(self, hosts: Sequence[HostLine]) -> str:
        first = hosts[0].name
        if self._task.master_addr is not None and first == self._task.hosts[0].name:
            return self._task.master_addr
        return "127.0.0.1" if len(hosts) == 1 else first

    # ---- checkpoints -----------------------------------------------------------------------

    def _saved(self) -> object:
        """Changes with every new checkpoint."""
        if self._task.checkpoints is None:
            return None
        try:
            return (self._task.checkpoints / "latest").stat().st_mtime_ns
        except OSError:
            return None

    def _resume_words(self) -> list[str]:
        """What makes the command go on from the newest whole checkpoint; nothing if there is none.

        Where a damaged one is the newest, the file `latest` names the one before from now on.
        """
        task = self._task
        if task.checkpoints is None:
            return []
        faults: list[str] = []
        for tag in candidates(task.checkpoints):
            fault = fault_of(task.checkpoints / tag)
            if fault is None:
                if faults:
                    name_latest(task.checkpoints, tag)
                self._note("checkpoint", tag=tag)
                return [word for word in task.resume if word not in task.words]
            faults.append(fault)
            self._note("damaged", tag=tag, fault=fault)
        if faults:
            raise CheckpointError(
                f"{task.checkpoints} must hold a checkpoint that is whole, but has none: "
                f"{faults[0]}. Name another folder to begin anew."
            )
        if self._starts and self._is_own and task.folder is not None:
            task.folder.begin_again()
        return []

    # ---- what is told ----------------------------------------------------------------------

    def _nap(self, seconds: float) -> None:
        """Wait, or less if the user asks to end."""
        deadline_s = time.monotonic() + seconds
        while not self._asked and (left_s := deadline_s - time.monotonic()) > 0:
            time.sleep(min(left_s, 0.2))

    def _note(self, event: str, **facts: Any) -> None:
        """Write an event down, and say it."""
        task = self._task
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        entry = {"time": now, "on": socket.gethostname(), "event": event} | facts
        try:
            task.log.parent.mkdir(parents=True, exist_ok=True)
            with task.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as exc:
            raise DataError(f"--log must be writable, got {task.log}: {exc.strerror}.") from exc
        print(f"supervise: {event}{_told(facts)}", file=sys.stderr, flush=True)


def _told(facts: Mapping[str, Any]) -> str:
    words = {
        name.replace("_", " "): " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in facts.items()
        if value != []
    }
    listed = ", ".join(f"{name} {value}" for name, value in words.items())
    return f": {listed}" if listed else ""
