"""Which hosts do not hear each other, though this one hears all of them: asked over ssh."""

from __future__ import annotations

import itertools
import queue
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .talker import Talker, words_on

LIMIT_S = 5.0
"""Two hosts that have not connected by then do not hear each other."""

START_S = 10.0
"""A host that has not begun to answer by then is not asked."""

SCRIPT = Path(__file__).with_name("hearing.py")


@dataclass(frozen=True)
class Cut:
    """Two hosts that cannot train together.

    Attributes:
        here: one of them, the earlier in the hostfile.
        there: the other one.
        lost: directions in which no datagram arrives: (from, to); both, or none, where it is not
            known that one is whole.
    """

    here: str
    there: str
    lost: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """For people."""
        if len(self.lost) == 1:
            ((here, there),) = self.lost
            return f"packets from {here} to {there} are lost"
        return f"{self.here} and {self.there} do not hear each other"


class Links:
    """The links between all hosts, looked at where a run has ended by itself.

    Args:
        environ: that all ranks get; may name the interface that they connect over.
        note: writes an event down.

    Attributes:
        doubted: a run has ended by itself since all links were whole.
        cuts: those that were found at last.
    """

    def __init__(self, environ: Mapping[str, str], note: Callable[..., None]) -> None:
        found = (environ.get(f"{name}_SOCKET_IFNAME", "") for name in ("GLOO", "NCCL"))
        self._interface = next(filter(None, found), "")
        self._note = note
        self.doubted = False
        self.cuts: list[Cut] = []

    def hearing(self, hosts: Mapping[str, Sequence[str]]) -> list[str]:
        """Hosts that can train together.

        Args:
            hosts: that answer: name to the words of ssh.
        """
        asks = self.doubted and len(hosts) > 1
        self.cuts = cut_links(hosts, self._interface) if asks else []
        self.doubted = bool(self.cuts)
        left = without_cuts(list(hosts), self.cuts)
        if self.cuts:
            out = [name for name in hosts if name not in left]
            self._note("cut", links="; ".join(map(str, self.cuts)), left_out=out)
        return left

    def told(self, absent: Sequence[str]) -> str:
        """Why there are too few hosts, and what to do. Pure."""
        faults = [f"{', '.join(absent)} did not answer: ssh to them by hand"] if absent else []
        if self.cuts:
            faults.append(f"{'; '.join(map(str, self.cuts))}: mend what lies between them")
        return ", and ".join(faults)

    def beside(
        self, running: Sequence[str], back: Sequence[str], ssh: Callable[[str], Sequence[str]]
    ) -> list[str]:
        """Of hosts that answer again, those that can train beside the ones that do.

        Args:
            running: hosts that train.
            back: hosts that answer again.
            ssh: the words that reach a host.
        """
        if not back or not self.cuts:
            return list(back)
        names = [*running, *back]
        left = without_cuts(names, cut_links({name: ssh(name) for name in names}, self._interface))
        return [name for name in back if name in left]


def cut_links(hosts: Mapping[str, Sequence[str]], interface: str) -> list[Cut]:
    """Let all hosts call each other.

    Args:
        hosts: name to the words of ssh; empty: this host.
        interface: that ranks connect over; empty: that of the host's name.

    Returns:
        Those that do not hear each other. A host that answers nothing itself is in none of them.
    """
    asked = {name: _Asked(name, ssh) for name, ssh in hosts.items()}
    try:
        for name, one in asked.items():
            one.tell({"name": name, "interface": interface, "limit_s": LIMIT_S})
        begun_s = time.monotonic() + START_S
        ends = {name: one.hear("ends", begun_s) for name, one in asked.items()}
        there = {name: found for name, found in ends.items() if found is not None}
        for name in there:
            asked[name].tell({"others": {k: v for k, v in there.items() if k != name}})
        done_s = time.monotonic() + 2 * LIMIT_S
        told = {name: asked[name].hear("reached", done_s, whole=True) for name in there}
        return judge({name: found for name, found in told.items() if found is not None})
    finally:
        for one in asked.values():
            one.close()


def judge(told: Mapping[str, Mapping[str, Any]]) -> list[Cut]:
    """What the answers of all hosts mean. Pure.

    Args:
        told: host to whom it has `reached` (none: not known), and whom it has `heard`.
    """
    found = []
    for here, there in itertools.combinations(told, 2):
        if False not in (told[here]["reached"].get(there), told[there]["reached"].get(here)):
            continue
        ways = [(here, there), (there, here)]
        lost = tuple(way for way in ways if way[0] not in told[way[1]]["heard"])
        found.append(Cut(here, there, lost))
    return found


def without_cuts(names: Sequence[str], cuts: Sequence[Cut]) -> list[str]:
    """Hosts that all hear each other: of two that do not, the later one is left out. Pure.

    The one with most cuts goes first, so that as many as possible are left.
    """
    left, open_cuts = list(names), list(cuts)
    while open_cuts:
        counts = {name: sum(name in (c.here, c.there) for c in open_cuts) for name in left}
        worst = max(left, key=lambda name: (counts[name], left.index(name)))
        left.remove(worst)
        open_cuts = [cut for cut in open_cuts if worst not in (cut.here, cut.there)]
    return left


class _Asked:
    """A host that is asked; see `hearing`."""

    def __init__(self, name: str, ssh: Sequence[str]) -> None:
        self._lines: queue.Queue[Mapping[str, Any] | None] = queue.Queue()
        words = words_on(name, ssh, [sys.executable, str(SCRIPT)])
        self._talker = Talker(words, "hearing", self._lines.put)

    def tell(self, line: Mapping[str, Any]) -> None:
        if not self._talker.tell(line):
            self._lines.put(None)

    def hear(self, key: str, until_s: float, *, whole: bool = False) -> Any:
        """What it says of something; None: nothing, in time."""
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                return None
            if line is None:
                return None
            if key in line:
                return line if whole else line[key]

    def close(self) -> None:
        self._talker.close(3.0)
