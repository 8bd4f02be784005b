"""The ranks of one method: processes on hosts, commanded over pipes, their bytes counted.

`BedPlace` puts them on hosts of a bed; `LoopbackPlace` side by side on this machine, unshaped and
uncounted, for machines without root.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from ds_gradprune.errors import GradPruneError
from labs.race.job import Job, Recipe
from tools.netbed import Bed

ROOT = Path(__file__).resolve().parents[2]

PINNED = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
}

LOG_LINES = 12
"""Of a failed rank's log, so many last lines are told."""


class Place(Protocol):
    """Where ranks run."""

    num_hosts: int

    def popen(self, host: int, words: list[str], **options: Any) -> subprocess.Popen[str]:
        """Start one rank's process."""
        ...

    def set_rate(self, rate: str | None) -> None:
        """Shape all links; None: unshaped."""
        ...

    def sent_bytes(self) -> list[int] | None:
        """What each host has sent so far; None: not counted here."""
        ...


class BedPlace:
    """The hosts of a bed."""

    def __init__(self, bed: Bed) -> None:
        self.num_hosts = len(bed.hosts)
        self._bed = bed

    def popen(self, host: int, words: list[str], **options: Any) -> subprocess.Popen[str]:
        """See `Place`."""
        return self._bed.hosts[host].popen(
            words, cwd=ROOT, env=self._bed.environ() | PINNED, **options
        )

    def set_rate(self, rate: str | None) -> None:
        """See `Place`."""
        self._bed.set_rate(rate)

    def sent_bytes(self) -> list[int] | None:
        """See `Place`: whole Ethernet frames."""
        return [host.counters().sent_bytes for host in self._bed.hosts]


class LoopbackPlace:
    """All ranks on this machine's loopback interface."""

    def __init__(self, num_hosts: int) -> None:
        self.num_hosts = num_hosts

    def popen(self, host: int, words: list[str], **options: Any) -> subprocess.Popen[str]:
        """See `Place`."""
        env = os.environ | PINNED | {"GLOO_SOCKET_IFNAME": "lo"}
        return subprocess.Popen(words, cwd=ROOT, env=env, **options)

    def set_rate(self, rate: str | None) -> None:
        """See `Place`; there is only "unshaped"."""
        assert rate is None

    def sent_bytes(self) -> list[int] | None:
        """See `Place`."""
        return None


@dataclass(frozen=True, slots=True)
class Step:
    """One step, seen over all ranks.

    Attributes:
        step: counted from 1.
        loss: training loss, mean over ranks.
        wall_s, compute_s, codec_s: of the slowest rank.
        comm_s: exposed communication of the host that waited least: the last to arrive waits for
            nobody, so this is the wire. Of a host's ranks the slowest counts.
        payload_bytes: what the method itself says one host sent; None: it does not say.
        density: share of elements sent; None: nothing is pruned.
        kind: "usual"; or "dense", not compressed, at first or in between; or "silent", without any
            exchange.
    """

    step: int
    loss: float
    wall_s: float
    compute_s: float
    codec_s: float
    comm_s: float
    payload_bytes: int | None
    density: float | None
    kind: str


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive steps on an unchanged link.

    Attributes:
        steps: in order.
        validations: (step, validation loss).
        wire_bytes: what a host sent per step, at its interface, mean over hosts and steps; None:
            not counted.
    """

    steps: list[Step]
    validations: list[tuple[int, float]]
    wire_bytes: float | None


class Crew:
    """The processes of one method. Made by `crew`.

    Attributes:
        num_parameters: of the model.
    """

    def __init__(self, place: Place, processes: list[subprocess.Popen[str]], logs: list[IO[str]]):
        self._place, self._processes, self._logs = place, processes, logs
        self.num_parameters = 0

    def set_rate(self, rate: str | None) -> None:
        """Shape all links from now on."""
        self._place.set_rate(rate)

    def train(self, steps: int, eval_every: int | None = None) -> Stretch:
        """Train on.

        Raises:
            GradPruneError: a rank ended; its last words are quoted.
        """
        before = self._place.sent_bytes()
        self.tell({"do": "train", "steps": steps, "eval_every": eval_every})
        answers = self.hear()
        after = self._place.sent_bytes()
        wire_bytes = None
        if before is not None and after is not None and steps:
            sent = [late - early for early, late in zip(before, after, strict=True)]
            wire_bytes = statistics.fmean(sent) / steps
        rows = zip(*(answer["steps"] for answer in answers), strict=True)
        validations = zip(*(answer["validations"] for answer in answers), strict=True)
        merged = [merge(row, self._place.num_hosts) for row in rows]
        return Stretch(merged, [_mean(v) for v in validations], wire_bytes)

    def tell(self, command: dict[str, Any]) -> None:
        """The same command to all ranks."""
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(command) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise GradPruneError(self._last_words()) from None

    def hear(self) -> list[dict[str, Any]]:
        """One answer from each rank, in rank order."""
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while len(answers) < len(self._processes):
                for key, _ in selector.select():
                    line = self._processes[key.data].stdout.readline()
                    if not line:  # the end of the pipe, so of the process
                        raise GradPruneError(self._last_words())
                    answers[key.data] = json.loads(line)
                    selector.unregister(key.fileobj)
        return [answers[rank] for rank in range(len(answers))]

    def _last_words(self) -> str:
        """Of the rank that ended with an error; its peers then wait in vain."""
        deadline_s = time.monotonic() + 5.0
        while time.monotonic() < deadline_s and all(p.poll() is None for p in self._processes):
            time.sleep(0.01)
        rank = next((r for r, p in enumerate(self._processes) if p.poll() not in (None, 0)), 0)
        log = self._logs[rank]
        log.seek(0)
        lines = [line.rstrip() for line in log if line.strip()][-LOG_LINES:]
        return "\n".join([f"rank {rank} ended early:", *lines])


@contextlib.contextmanager
def crew(
    place: Place, method: str, recipe: Recipe, data: Path, seed: int, rate: str | None = None
) -> Iterator[Crew]:
    """Start all ranks; the block gets them ready; they end with the block.

    Args:
        place: where they run.
        method: its name.
        recipe: how it trains.
        data: the tokens.
        seed: of weights and data.
        rate: of the links, from the start: a connection keeps the size of the pieces in which its
            frames may pass. None: unshaped.

    Raises:
        GradPruneError: a rank could not start; its last words are quoted.
    """
    place.set_rate(rate)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ethernet-")))
        processes: list[subprocess.Popen[str]] = []
        logs: list[IO[str]] = []
        stack.callback(_end, processes)
        world_size = place.num_hosts * recipe.ranks_per_host
        for rank in range(world_size):
            log = stack.enter_context((folder / f"rank{rank}.log").open("w+"))
            store = str(folder / "store")
            job = Job(method, recipe, str(data), store, seed, rank, world_size)
            words = [sys.executable, "-m", "labs.race.worker", job.to_json()]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            host = rank // recipe.ranks_per_host
            processes.append(place.popen(host, words, **pipes, stderr=log, text=True))
            logs.append(log)
        ranks = Crew(place, processes, logs)
        ranks.num_parameters = ranks.hear()[0]["parameters"]
        yield ranks
        ranks.tell({"do": "stop"})
        for process in processes:
            process.wait()
        place.set_rate(None)


def _end(processes: list[subprocess.Popen[str]]) -> None:
    """Nothing is left running, however the block ended."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # the rank is gone: nothing is lost
                pipe.close()


def merge(rows: Sequence[dict[str, Any]], num_hosts: int) -> Step:
    """One step from its ranks' records, which are in rank order, so host by host. Pure."""
    per_host = len(rows) // num_hosts
    hosts = [rows[first : first + per_host] for first in range(0, len(rows), per_host)]
    payloads = [sum(row["payload_bytes"] or 0 for row in host) for host in hosts]
    return Step(
        step=rows[0]["step"],
        loss=statistics.fmean(row["loss"] for row in rows),
        wall_s=max(row["wall_s"] for row in rows),
        compute_s=max(row["compute_s"] for row in rows),
        codec_s=max(row["codec_s"] for row in rows),
        comm_s=min(max(row["comm_s"] for row in host) for host in hosts),
        payload_bytes=None if rows[0]["payload_bytes"] is None else max(payloads),
        density=rows[0]["density"],
        kind=rows[0]["kind"],
    )


def _mean(parts: tuple[list[float], ...]) -> tuple[int, float]:
    """The validation loss from each rank's (step, sum, count)."""
    return int(parts[0][0]), sum(part[1] for part in parts) / sum(part[2] for part in parts)
