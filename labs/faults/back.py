"""Lost ranks of `launch/train.py` that come back, one after the other, in one run on one host.

    python -m labs.faults.back --returns 6 --out results/faults_cpu_202611_back.json

A rank is killed, and started again with the same command when the others have gone on without it.
Measured are three times: how long the others stood still for the loss, how long they stood still
for the return, and how long it took from the start of the process to its first exchange. The log's
lines are watched from here; a standstill is the time before the first line with another number of
islands, less the median.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labs.machine import commit, machine

ROOT = Path(__file__).resolve().parents[2]
RANKS, STEPS = 3, 4

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "gradient_pruning": {
        "min_islands": 1,
        "timeout_s": 30.0,
        "warmup_steps": 4,
        "ramp_steps": 0,
        "window_size": 4,
        "verify_every_steps": 1,
        "density": {"initial": 0.01, "min": 0.01, "max": 0.01},
    },
}
"""The weights are compared in every exchange: islands that differ end the run."""


class Ranks:
    """The processes of a run, and its log as it grows.

    Args:
        folder: for the configuration and the run.
        model: of launch/train.py.
    """

    def __init__(self, folder: Path, model: str) -> None:
        (folder / "config.json").write_text(json.dumps(CONFIG))
        self._words = [sys.executable, "launch/train.py", "--config", str(folder / "config.json")]
        self._words += ["--model", model, "--out", str(folder / "out"), "--steps", "1000000"]
        self._words += ["--eval-every", "1000000", "--save-every", "1000000"]
        self._log = folder / "out" / "log.jsonl"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = str(probe.getsockname()[1])
        self.lines: list[tuple[float, dict[str, Any]]] = []
        self._read = 0
        self._processes = [self._start(rank) for rank in range(RANKS)]

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        place = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": RANKS}
        environ = {name: str(number) for name, number in place.items()}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._port, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            self._words,
            cwd=ROOT,
            env=os.environ | environ | {"DS_ACCELERATOR": "cpu"},
            stderr=subprocess.DEVNULL,
        )

    def again(self, rank: int) -> float:
        """Start a rank again; when, on the monotonic clock."""
        self._processes[rank] = self._start(rank)
        return time.monotonic()

    def kill(self, rank: int) -> None:
        """Kill a rank."""
        self._processes[rank].send_signal(signal.SIGKILL)
        self._processes[rank].wait()

    def until(self, senders: int, lines: int, limit_s: float = 240.0) -> float:
        """When the first of so many further lines with so many senders came."""
        deadline_s, found = time.monotonic() + limit_s, list[float]()
        while len(found) < lines:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{senders} islands did not train within {limit_s:g} s")
            found += [at for at, line in self._look() if line["senders"] == senders]
            time.sleep(0.005)
        return found[0]

    def _look(self) -> list[tuple[float, dict[str, Any]]]:
        data = self._log.read_bytes() if self._log.is_file() else b""
        whole = data[self._read : data.rfind(b"\n") + 1]
        self._read += len(whole)
        now_s = time.monotonic()
        new = [(now_s, json.loads(line)) for line in whole.splitlines()]
        self.lines += new
        return new

    def end(self) -> None:
        """Kill all."""
        for process in self._processes:
            process.kill()
            process.wait()


def play(folder: Path, model: str, returns: int, seed: int) -> list[dict[str, Any]]:
    """A row for every return."""
    chance, rows = random.Random(seed), []
    ranks = Ranks(folder, model)
    try:
        ranks.until(RANKS, STEPS)
        for number in range(returns):
            rank = number % RANKS if number < RANKS else chance.randrange(RANKS)
            ranks.kill(rank)
            gone_s = ranks.until(RANKS - 1, STEPS)
            began_s = ranks.again(rank)
            back_s = ranks.until(RANKS, STEPS)
            row = {
                "rank": rank,
                "loss_s": _standstill(ranks, gone_s),
                "return_s": _standstill(ranks, back_s),
                "start_s": round(back_s - began_s, 3),
                "step_s": round(_median(ranks), 4),
            }
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    finally:
        ranks.end()
    return rows


def _median(ranks: Ranks) -> float:
    times = [at for at, _ in ranks.lines]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def _standstill(ranks: Ranks, at_s: float) -> float:
    """The time before the line that came then, less the median."""
    times = [at for at, _ in ranks.lines]
    return round(at_s - times[times.index(at_s) - 1] - _median(ranks), 3)


def page(rows: Sequence[dict[str, Any]], command: str, facts: dict[str, Any]) -> str:
    """The page as Markdown. Pure."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        "# Lost islands that come back\n",
        f"- command: `{command}`",
        f"- commit {facts['commit']}, {facts['date']}",
        f"- {facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}, load average at the "
        f"end {facts['load_average'][0]:.1f}, of which the run's own ranks are {RANKS}",
        f"- CPython {facts['python']}, {versions}\n",
        f"{RANKS} ranks of `launch/train.py` on one host, each an island, over gloo on loopback. A "
        "rank is killed, and started again with the same command when the others have made "
        f"{STEPS} steps without it. All weights are compared in every exchange. Seconds: median "
        "(smallest to largest).\n",
        "| model | returns | step | the others stand still for the loss | for the return | from "
        "the start of the process to its first exchange |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        spreads = [_spread([row[key] for row in mine]) for key in ("loss_s", "return_s", "start_s")]
        step = statistics.median(row["step_s"] for row in mine)
        lines.append(f"| {model} | {len(mine)} | {step:.2f} | {' | '.join(spreads)} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--returns", type=int, default=6, help="of each model (default: 6)")
    flags.add_argument("--models", default="nano,micro", help="(default: nano,micro)")
    flags.add_argument("--seed", type=int, default=0, help="of which rank is lost (default: 0)")
    flags.add_argument("--out", type=Path, help="JSON file, with a page beside it")
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = flags.parse_args(words)
    rows = []
    for model in given.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found = play(Path(folder), model, given.returns, given.seed)
        rows += [{"model": model} | row for row in found]
    if given.out is not None:
        facts = machine() | {"commit": commit(ROOT), "date": str(datetime.date.today())}
        given.out.write_text(json.dumps({"facts": facts, "returns": rows}, indent=1) + "\n")
        command = shlex.join(["python", "-m", "labs.faults.back", *words])
        given.out.with_suffix(".md").write_text(page(rows, command, facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
