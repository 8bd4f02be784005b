"""A host of a supervised run, seen from where the supervisor runs: its keeper, over ssh or not."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_gradprune.commands.hosts import is_here

from .talker import Talker, started, words_on

PROBE_S = 10.0
"""A host that has not let us in by then does not answer."""

KEEPER = Path(__file__).with_name("keeper.py")


@dataclass(frozen=True)
class Heard:
    """A line of a keeper.

    Attributes:
        host: which one has said it.
        facts: what; None: it says no more.
    """

    host: KeptHost
    facts: Mapping[str, Any] | None


class KeptHost:
    """One host in one attempt.

    Args:
        name: for ssh.
        ssh: the words of ssh, up to the host's name; empty: only hosts that are this one.
        heard: where lines go.
        shows_name: lines of the ranks begin with the host's name.

    Raises:
        ConfigError: there is no ssh to reach it with.

    Attributes:
        name: see there.
        codes: exit codes of the ranks that have ended, by local rank.
        heard_s: when the keeper was last heard.
        beaten_s: when it was last sent a beat.
        is_lost: it is given up.
    """

    def __init__(
        self, name: str, ssh: Sequence[str], heard: queue.Queue[Heard], *, shows_name: bool
    ) -> None:
        self.name = name
        self.codes: dict[int, int] = {}
        self.is_lost = False
        self.heard_s = self.beaten_s = time.monotonic()
        self._queue = heard
        self._prefix = f"{name}: " if shows_name else ""
        words = words_on(name, ssh, [sys.executable, str(KEEPER)])
        self._talker = Talker(words, "keeper", self._hear, self._show)

    def send(self, line: Mapping[str, Any]) -> None:
        """Send a job, an order or, if empty, a beat; a keeper that is gone hears nothing."""
        if self.is_lost:
            return
        if self._talker.tell(line):
            self.beaten_s = time.monotonic()

    def close(self, limit_s: float = 3.0) -> None:
        """Let the keeper end its ranks and itself, or leave it to its lease. Twice is fine."""
        self._talker.close(0.0 if self.is_lost else limit_s)

    def _hear(self, facts: Mapping[str, Any] | None) -> None:
        if facts is not None:
            self.heard_s = time.monotonic()
        self._queue.put(Heard(self, facts))

    def _show(self, line: str) -> None:
        sys.stderr.write(self._prefix + line)
        sys.stderr.flush()


def ssh_to(name: str, ssh: Sequence[str], *, is_given: bool) -> list[str]:
    """What reaches a host: nothing for this one, unless the user has said how."""
    return [] if is_here(name) and not is_given else list(ssh)


def answering(hosts: Mapping[str, Sequence[str]], limit_s: float = PROBE_S) -> list[str]:
    """The hosts on which a command runs within `limit_s`, in order.

    Args:
        hosts: name to the words of ssh; empty: this host.
        limit_s: for all of them together, which are asked at once.

    Raises:
        ConfigError: there is no ssh to ask with.
    """
    asked = {name: started(words_on(name, ssh, ["true"])) for name, ssh in hosts.items()}
    deadline_s = time.monotonic() + limit_s
    found = []
    for name, process in asked.items():
        try:
            if process.wait(max(0.0, deadline_s - time.monotonic())) == 0:
                found.append(name)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return found


class Absent:
    """Hosts that are left out, asked again and again whether they are back; a context manager.

    Args:
        hosts: name to the words of ssh.
        every_s: seconds between two questions; 0: they are never asked.
        note: writes an event down.
        usable: of those that answer, the ones that may take part; None: all.
    """

    def __init__(
        self,
        hosts: Mapping[str, Sequence[str]],
        every_s: float,
        note: Callable[..., None],
        usable: Callable[[list[str]], list[str]] | None = None,
    ) -> None:
        self._hosts = hosts
        self._usable = usable or list
        self._every_s = every_s
        self._note = note
        self._over = threading.Event()
        self._back = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def are_back(self) -> bool:
        """Whether one of them has answered."""
        return self._back.is_set()

    def __enter__(self) -> Absent:
        """Begin to ask."""
        if self._hosts and self._every_s:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ask no more."""
        self._over.set()

    def _ask(self) -> None:
        while not self._over.wait(self._every_s):
            found = self._usable(answering(self._hosts))
            if found and not self._over.is_set():
                self._note("back", hosts=found)
                self._back.set()
                return
