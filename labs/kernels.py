"""The CPU's part of an exchange between two islands, beside the former build and beside a copy.

One island's part: select from own - shared, encode, check and decode both islands' payloads, move
both copies of the weights. The bytes in question are the own and the shared weights, 8 a parameter:
a copy of so many bytes by one thread is the unit, a pass. Contenders take turns in every round;
medians with the smallest and the largest of all rounds. With one thread, time is that thread's CPU
time, so that other work on the machine adds none; with more, it is wall-clock time. `--before`
names a folder that holds the former `ds_gradprune`: it runs in a process of its own, and its
weights must come out with equal bits.

With `--device cuda`, `kernels_gpu` measures the accelerator's part instead.

Own progress is the product of two normal numbers, so its tail is heavier than a normal one's.

    python -m labs.kernels [--numel 10000000 124000000] [--density 0.01 0.05 0.25]
        [--threads 1 2] [--value-bits 2] [--bucket-numel 67108864] [--rounds 5] [--before PATH]

The last line of stdout is one JSON document. Its `cpu_passes` and `cpu_vs_before` are the worst of
the cells with one thread and at most 5 %.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labs.builds import Former, Present, Weights

CHUNK_NUMEL = 4096
MOST_DENSITY = 0.05
ROOT = Path(__file__).resolve().parents[1]


class Process:
    """The former build in a process of its own, which is told when its turn is.

    Args:
        folder: holds the former `ds_gradprune`.
        numel: see `Weights`.
        value_bits: see `Present`.
        bucket_numel: see `Present`.
    """

    def __init__(self, folder: Path, numel: int, value_bits: int, bucket_numel: int) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "labs.kernels",
                "--serve",
                *map(str, (numel, value_bits, bucket_numel)),
            ],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (folder.resolve(), ROOT)))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, command: str, k: int, threads: int) -> dict[str, Any]:
        """Let it prepare or exchange once."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(command, k, threads, file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(numel: int, value_bits: int, bucket_numel: int) -> None:
    """Do as `Process` says, until it says no more."""
    weights = Weights(numel)
    contender = Former(weights, value_bits, bucket_numel)
    for line in sys.stdin:
        command, k, threads = line.split()
        torch.set_num_threads(int(threads))
        if command == "prepare":
            contender.prepare(int(k))
            answer: dict[str, Any] = {}
        else:
            weights.reset()
            answer = {"parts": contender.exchange(int(k)), "crc": weights.crc()}
        print(json.dumps(answer), flush=True)


def copy_seconds(memory: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]) -> float:
    """Of a copy of 8 bytes a parameter, by one thread."""
    start_s = time.thread_time()
    np.copyto(*memory)
    return time.thread_time() - start_s


def measure(
    numel: int, densities: list[float], threads: list[int], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All cells of one size."""
    weights = Weights(numel)
    present = Present(weights, options.value_bits, options.bucket_numel)
    former = None
    if options.before is not None:
        former = Process(options.before, numel, options.value_bits, options.bucket_numel)
    source = np.ones(2 * weights.numel, np.float32)  # written: untouched zeros lie in no memory
    memory = source.copy(), source
    cells = []
    for density, count in itertools.product(densities, threads):
        k = max(1, math.ceil(density * CHUNK_NUMEL))
        torch.set_num_threads(count)
        present.prepare(k)
        if former is not None:
            former.ask("prepare", k, count)
        rounds: list[dict[str, Any]] = []
        for _ in range(options.rounds + 1):  # the first one warms up
            weights.reset()
            seconds = {"copy": copy_seconds(memory)}
            parts = present.exchange(k)
            seconds["present"] = sum(parts.values())
            seconds |= {f"present {name}": part for name, part in parts.items()}
            if former is not None:
                answer = former.ask("exchange", k, count)
                seconds["former"] = sum(answer["parts"].values())
                seconds |= {f"former {name}": part for name, part in answer["parts"].items()}
                if answer["crc"] != weights.crc():
                    raise SystemExit("present and former build must end in equal bits, got others")
            rounds.append(seconds)
        cells.append(cell(weights.numel, density, count, rounds[1:]))
        show(cells[-1])
    if former is not None:
        former.close()
    return cells


def cell(
    numel: int, density: float, threads: int, rounds: list[dict[str, float]]
) -> dict[str, Any]:
    """Medians and spreads of one cell; `passes` in copies of 8 bytes a parameter."""
    median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    passes = [r["present"] / r["copy"] for r in rounds]
    found = {
        "numel": numel,
        "density": density,
        "threads": threads,
        "seconds": median,
        "passes": statistics.median(passes),
        "passes_spread": [min(passes), max(passes)],
    }
    if "former" in median:
        shares = [r["present"] / r["former"] for r in rounds]
        found |= {
            "vs_before": statistics.median(shares),
            "vs_before_spread": [min(shares), max(shares)],
        }
    return found


def show(found: dict[str, Any]) -> None:
    """One cell as a line."""
    seconds, numel = found["seconds"], found["numel"]
    ns = {name: 1e9 * second / numel for name, second in seconds.items()}
    parts = ", ".join(
        f"{name.removeprefix('present ')} {value:.2f}"
        for name, value in ns.items()
        if name.startswith("present ")
    )
    low, high = found["passes_spread"]
    line = (
        f"{numel / 1e6:6.1f} M  density {found['density']:<5} threads {found['threads']}  "
        f"copy {ns['copy']:.2f} ns  present {ns['present']:.2f} ns ({parts}) = "
        f"{found['passes']:.2f} passes ({low:.2f} to {high:.2f})"
    )
    if "former" in ns:
        low, high = found["vs_before_spread"]
        line += (
            f"  former {ns['former']:.2f} ns, {found['vs_before']:.3f} ({low:.3f} to {high:.3f})"
        )
    print(line, flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--numel", type=int, nargs="+")
    parser.add_argument("--density", type=float, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--value-bits", type=int, default=2, choices=(2, 4, 16, 32))
    parser.add_argument("--bucket-numel", type=int, default=2**26)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="folder of the former build")
    parser.add_argument("--seconds", type=float, default=40.0, help="with cuda: no cell after them")
    parser.add_argument("--variants", action="store_true", help="with cuda: shapes of programs")
    parser.add_argument("--serve", type=int, nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Run, print a line per cell and the JSON document."""
    options = parse(sys.argv[1:])
    if options.serve:
        serve(*options.serve)
        return
    on_cpu = options.device == "cpu"
    options.numel = options.numel or (
        [10_000_000, 124_000_000] if on_cpu else [100_000_000, 1_000_000_000]
    )
    options.density = options.density or ([0.01, 0.05, 0.25] if on_cpu else [0.01, 0.05])
    cells: list[dict[str, Any]] = []
    for numel in options.numel if on_cpu else ():
        cells += measure(numel, options.density, options.threads, options)
    judged = [c for c in cells if c["threads"] == 1 and c["density"] <= MOST_DENSITY]
    before = [found["vs_before"] for found in judged if "vs_before" in found]
    document = {
        "cpu_passes": max((found["passes"] for found in judged), default=None),
        "cpu_vs_before": max(before, default=None),
        "gpu_fraction_of_copy": None,
        "cells": cells,
    }
    if not on_cpu:
        # Not above: the former build's process imports this file and has no such modules.
        document |= importlib.import_module("labs.kernels_gpu").measure(options)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
