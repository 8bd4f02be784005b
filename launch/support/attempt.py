"""One attempt at a supervised run: the ranks of all hosts, from their start to the end of the last.

A rank that fails, and a host that is not heard any more, end the attempt. The other ranks get a
moment to say what they saw. Where the run goes on without a lost rank, that one alone is started
again, on the same host.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .comebacks import Comebacks
from .keeper import BEAT_S
from .kept_host import Absent, Heard, KeptHost

_KILL_S = 3.0
"""A killed rank has ended by then, or its host is taken for lost."""

_LAST_S = 60.0
"""When one rank has ended well the others have, too, by then."""

SIGNALLED = 128
"""A shell's exit code of a process that signal n has ended is 128 + n."""


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds.

    Attributes:
        host_s: a host that is not heard for so long is lost, and ends its own ranks.
        grace_s: so long the other ranks have after the first has failed.
    """

    host_s: float
    grace_s: float


@dataclass
class Outcome:
    """How an attempt ended.

    Attributes:
        code: 0: every rank has ended well. Else that of the rank that failed first.
        lost: hosts that were not heard any more.
        killed: a signal has ended some rank, and it was not from here.
        grows: the ranks were asked to end, because a host is back.
        free_s: by then, on the monotonic clock, the ranks of lost hosts have ended, too.
    """

    code: int = 0
    lost: list[str] = field(default_factory=list)
    killed: bool = False
    grows: bool = False
    free_s: float = 0.0


class Attempt:
    """One attempt.

    Args:
        hosts: name to what reaches it, in the order of ranks.
        jobs: what each keeper is to do.
        limits: see there.
        note: writes an event down: its name, and facts.
        asked: how often the user has asked to end: 1: ranks end by themselves; 2: they are killed.
        grows: whether a host is back; the ranks are asked to end then.
        comebacks: lost ranks are started again while the others train on; None: they are not.
    """

    def __init__(
        self,
        hosts: Mapping[str, Sequence[str]],
        jobs: Sequence[Mapping[str, Any]],
        limits: Limits,
        note: Callable[..., None],
        asked: Callable[[], int],
        grows: Callable[[], bool],
        comebacks: Comebacks | None = None,
    ) -> None:
        self._comebacks = comebacks
        self._makes = [
            (name, ssh, job) for (name, ssh), job in zip(hosts.items(), jobs, strict=True)
        ]
        self._absent: dict[str, Absent] = {}
        self._limits = limits
        self._grows = grows
        self._note = note
        self._asked = asked
        self._told = 0
        self._is_ending = False
        self._outcome = Outcome()
        self._deadline_s: float | None = None
        self._queue: queue.Queue[Heard] = queue.Queue()
        self._sizes = {name: len(job["environs"]) for name, _, job in self._makes}
        self._hosts = [self._open(place) for place in range(len(self._makes))]

    def run(self) -> Outcome:
        """Return when no rank runs any more, on any host that answers."""
        try:
            while self._running():
                self._hear()
                self._beat()
                self._pass_on()
                self._start_again()
                if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
                    self._end()
                    break
        finally:
            for host in self._hosts:
                host.close()
            for absent in self._absent.values():
                absent.__exit__()
        if self._comebacks is not None and self._has_finished():
            self._outcome.code = 0
        if self._outcome.lost:
            beaten_s = max(host.beaten_s for host in self._hosts if host.is_lost)
            self._outcome.free_s = beaten_s + self._limits.host_s + BEAT_S
        return self._outcome

    def _open(self, place: int) -> KeptHost:
        """A keeper that begins with its job."""
        name, ssh, job = self._makes[place]
        host = KeptHost(name, ssh, self._queue, shows_name=len(self._makes) > 1)
        host.send({**job, "stays": self._comebacks is not None})
        return host

    def _has_finished(self) -> bool:
        """Some rank has ended well: the run is over, whatever became of those that were lost."""
        return any(0 in host.codes.values() for host in self._hosts)

    # ---- ranks that come back ------------------------------------------------------------------

    def _trains_on(self) -> bool:
        """Enough ranks are left, and nobody has asked them to end."""
        if self._comebacks is None or self._deadline_s is not None or self._told:
            return False
        if not self._comebacks.trains():
            return False
        left = sum(self._sizes[host.name] - len(host.codes) for host in self._running())
        return left >= self._comebacks.least and not self._has_finished()

    def _start_again(self) -> None:
        if self._comebacks is None or not self._trains_on():
            return
        for place, host in enumerate(self._hosts):
            if host.is_lost and self._absent[host.name].are_back():
                if self._comebacks.due(host.name):
                    self._note("again", host=host.name)
                    self._hosts[place] = self._open(place)
                continue
            for rank in list(host.codes):
                if not host.is_lost and self._comebacks.due((host.name, rank)):
                    self._note("again", host=host.name, local_rank=rank)
                    del host.codes[rank]
                    host.send({"do": "start", "rank": rank})

    def _running(self) -> list[KeptHost]:
        return [
            host
            for host in self._hosts
            if not host.is_lost and len(host.codes) < self._sizes[host.name]
        ]

    def _hear(self) -> None:
        """Take in what has come, for a beat at most."""
        try:
            heard = self._queue.get(timeout=BEAT_S / 2)
        except queue.Empty:
            return
        host, facts = heard.host, heard.facts
        if facts is None:
            if host in self._running():
                self._lose(host, "its keeper is gone")
        elif "fault" in facts:
            self._note("fault", host=host.name, fault=facts["fault"])
            self._lose(host, str(facts["fault"]))
        elif "pids" in facts:
            self._note("ranks", host=host.name, pids=facts["pids"])
        elif "code" in facts:
            host.codes[facts["rank"]] = facts["code"]
            self._judge(host, facts["rank"], facts["code"])

    def _judge(self, host: KeptHost, rank: int, code: int) -> None:
        self._note("ended", host=host.name, local_rank=rank, code=code)
        if code == 0:
            if self._comebacks is not None and self._deadline_s is None:
                # A rank that was started again may wait for a run that is over.
                self._deadline_s = time.monotonic() + max(self._limits.grace_s, _LAST_S)
            return
        if self._comebacks is not None and self._trains_on():
            self._comebacks.rank_later(host.name, rank)
            return
        if not self._outcome.code:
            self._outcome.code = code if code > 0 else SIGNALLED - code
        if self._deadline_s is None:
            self._deadline_s = time.monotonic() + self._limits.grace_s
        self._outcome.killed |= code < 0 and not self._is_ending

    def _lose(self, host: KeptHost, why: str) -> None:
        host.is_lost = True
        self._note("lost", host=host.name, why=why)
        if self._comebacks is not None and self._trains_on():
            free_s = host.beaten_s + self._limits.host_s + BEAT_S
            self._comebacks.host_later(host.name, free_s)
            ssh = {name: ssh for name, ssh, _ in self._makes}[host.name]
            self._absent[host.name] = Absent(
                {host.name: ssh}, self._comebacks.every_s, self._note
            ).__enter__()
            host.close()
            return
        self._outcome.lost.append(host.name)
        if self._deadline_s is None:
            self._outcome.code = 1
            self._deadline_s = time.monotonic() + self._limits.grace_s

    def _beat(self) -> None:
        now_s = time.monotonic()
        for host in self._running():
            if now_s - host.heard_s > self._limits.host_s:
                self._lose(host, f"not heard for {self._limits.host_s:g} s")
            elif now_s - host.beaten_s >= BEAT_S:
                host.send({})

    def _pass_on(self) -> None:
        """Pass on to the ranks what the user has asked, or that a host is back."""
        if not self._outcome.grows and self._deadline_s is None and self._grows():
            self._outcome.grows = True
            for host in self._running():
                host.send({"do": "end"})
        asked = self._asked()
        while self._told < asked:
            self._told += 1
            if self._told > 1:
                self._deadline_s = time.monotonic()
            for host in self._running():
                host.send({"do": "end"})

    def _end(self) -> None:
        """Kill what still runs."""
        self._is_ending = True
        for host in self._running():
            self._note("killed", host=host.name)
            host.send({"do": "kill"})
        deadline_s = time.monotonic() + _KILL_S
        while self._running() and time.monotonic() < deadline_s:
            self._hear()
        for host in self._running():
            self._lose(host, "its ranks cannot be ended")
