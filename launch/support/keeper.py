"""What launch/supervise.py runs on a host: starts its ranks, tells of them, and ends them.

Run as a script, with the standard library alone. The first line of stdin is the job, later ones are
beats and orders. Every line of stdout is one JSON object with the key "keeper"; what the ranks
write goes to stderr::

    {"words": [...], "folder": "...", "environs": [{...}, ...], "lease_s": 10, "stays": false}
    {}    {"do": "end"}    {"do": "kill"}    {"do": "start", "rank": 0}

    {"keeper": 1, "pids": [...]}    {"keeper": 1}    {"keeper": 1, "rank": 0, "code": -9}

With `stays` it waits for orders when all its ranks have ended, until stdin ends.

The ranks never outlive their keeper. It kills them when stdin ends and when no beat has come for
`lease_s`: so a host that is cut off has ended its ranks by the time others take over.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time

BEAT_S = 1.0
"""Both sides say that they are alive so often."""

_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1
_STDIN, _STDOUT, _STDERR = 0, 1, 2


def tell(**facts: object) -> None:
    """Write one line."""
    os.write(_STDOUT, json.dumps({"keeper": 1} | facts).encode() + b"\n")


class Keeper:
    """The ranks of this host.

    Args:
        job: the first line of stdin.
    """

    def __init__(self, job: dict) -> None:  # type: ignore[type-arg] # plain JSON
        self._lease_s = float(job["lease_s"])
        self._heard_s = self._told_s = time.monotonic()
        self._job = job
        self._ranks = [self._start(environ) for environ in job["environs"]]
        self._alive = dict(enumerate(self._ranks))
        tell(pids=[rank.pid for rank in self._ranks])

    def keep(self, rest: bytes) -> None:
        """Return when all ranks have ended, and no order can come.

        Args:
            rest: what came behind the job.
        """
        unread = rest
        while self._alive or self._job.get("stays"):
            *lines, unread = unread.split(b"\n")
            for line in lines:
                self._obey(json.loads(line))
            if select.select([_STDIN], [], [], _POLL_S)[0]:
                data = os.read(_STDIN, 65536)
                if not data:
                    return
                unread, self._heard_s = unread + data, time.monotonic()
            now_s = time.monotonic()
            if now_s - self._heard_s > self._lease_s:
                return
            self._reap()
            if now_s - self._told_s >= BEAT_S:
                self._told_s = now_s
                tell()

    def kill(self) -> None:
        """End every rank, and whatever it has started, at once."""
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                os.killpg(rank.pid, signal.SIGKILL)
        for rank in self._ranks:
            rank.wait()

    def _start(self, environ: dict[str, str]) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self._job["words"],
            cwd=self._job["folder"],
            env=os.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=_STDERR,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )

    def _obey(self, line: dict) -> None:  # type: ignore[type-arg] # plain JSON
        order = line.get("do")
        if order == "kill":
            self.kill()
        elif order == "start":
            number = line["rank"]
            self._ranks[number] = self._alive[number] = self._start(self._job["environs"][number])
            tell(pids=[rank.pid for rank in self._ranks])
        elif order == "end":
            for rank in self._alive.values():
                rank.send_signal(signal.SIGTERM)

    def _reap(self) -> None:
        for number, rank in list(self._alive.items()):
            code = rank.poll()
            if code is not None:
                del self._alive[number]
                tell(rank=number, code=code)


def main() -> int:
    """Keep the ranks of one job."""
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGHUP, _leave)
    first = b""
    while b"\n" not in first:
        data = os.read(_STDIN, 65536)
        if not data:
            return 0
        first += data
    job, _, rest = first.partition(b"\n")
    try:
        keeper = Keeper(json.loads(job))
    except OSError as exc:
        tell(fault=f"{exc.filename}: {exc.strerror}")
        return 2
    try:
        keeper.keep(rest)
    except BrokenPipeError:
        pass  # whoever listened is gone
    finally:
        keeper.kill()
    return 0


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _leave(_number: int, _frame: object) -> None:
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())
