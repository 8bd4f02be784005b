"""A host of a supervised run, seen from where the supervisor runs: its keeper, over ssh or not."""

from __future__ import annotations

import contextlib
import json
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_gradprune.commands.hosts import is_here
from ds_gradprune.errors import ConfigError

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
        self._process = _start(words, talks=True)
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._listen, self._show)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, line: Mapping[str, Any]) -> None:
        """Send a job, an order or, if empty, a beat; a keeper that is gone hears nothing."""
        if self.is_lost:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()
            self.beaten_s = time.monotonic()

    def close(self, limit_s: float = 3.0) -> None:
        """Let the keeper end its ranks and itself, or leave it to its lease. Twice is fine."""
        limit_s = 0.0 if self.is_lost else limit_s
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(limit_s)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # a login script has written something
                facts = json.loads(line)
                if isinstance(facts, dict) and "keeper" in facts:
                    self.heard_s = time.monotonic()
                    self._queue.put(Heard(self, facts))
        self._queue.put(Heard(self, None))

    def _show(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            sys.stderr.write(self._prefix + line.decode(errors="replace"))
            sys.stderr.flush()


def words_on(name: str, ssh: Sequence[str], words: Sequence[str]) -> list[str]:
    """The command that runs `words` on a host, which may be this one."""
    return [*ssh, name, shlex.join(words)] if ssh else list(words)


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
    asked = {
        name: _start(words_on(name, ssh, ["true"]), talks=False) for name, ssh in hosts.items()
    }
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


def _start(words: Sequence[str], *, talks: bool) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own: Ctrl-C is for us to pass on."""
    end = subprocess.PIPE if talks else subprocess.DEVNULL
    try:
        return subprocess.Popen(
            list(words), stdin=end, stdout=end, stderr=end, start_new_session=True
        )
    except OSError as exc:
        raise ConfigError(
            f"--ssh must begin with a command that can be run, got {words[0]}: {exc.strerror}."
        ) from exc


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
