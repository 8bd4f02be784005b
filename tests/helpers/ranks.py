"""Many ranks in one test: threads on the loopback transport, or processes on gloo."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_gradprune.wire.loopback import Delay, LoopbackHub, LoopbackTransport

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(
    world_size: int,
    work: Callable[[LoopbackTransport], Any],
    timeout_s: float = 30.0,
    delay: Delay | None = None,
) -> list[Any]:
    """Run `work(transport)` on one thread per rank; return the results in rank order.

    The first failure is raised again, with its rank in a note; the others are woken.
    """
    hub = LoopbackHub(world_size, timeout_s, delay)
    results: list[Any] = [None] * world_size
    failures: list[tuple[int, BaseException]] = []

    def main(rank: int) -> None:
        try:
            results[rank] = work(hub.transport(rank))
        except BaseException as exc:
            failures.append((rank, exc))
            hub.abort()

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        rank, exc = failures[0]
        exc.add_note(f"on rank {rank} of {world_size}")
        raise exc
    return results


def run_processes(
    world_size: int,
    module: str,
    function: str,
    arguments: dict[str, Any] | None = None,
    timeout_s: float = 100.0,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Call `module.function(**arguments)` in `world_size` fresh processes.

    Each gets RANK, WORLD_SIZE, LOCAL_RANK and a store file in DS_TEST_STORE instead of a port, so
    that parallel tests cannot collide. Returns what they return (pickled), in rank order.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world_size):
            out = Path(folder) / f"result_{rank}.pickle"
            code = (
                "import os,pickle,sys,importlib;"
                f"r=getattr(importlib.import_module({module!r}),{function!r})"
                f"(**pickle.loads({pickle.dumps(arguments or {})!r}));"
                f"open({str(out)!r},'wb').write(pickle.dumps(r));"
                # The result is written. During the interpreter's own end a thread of gloo may still
                # ask for the interpreter and so abort the process (-6): that is no test of ours.
                "sys.stdout.flush();sys.stderr.flush();os._exit(0)"
            )
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", code],
                    cwd=ROOT,
                    env=os.environ
                    | {
                        "PYTHONPATH": str(ROOT),
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(world_size),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "0",
                        "DS_TEST_STORE": str(Path(folder) / "store"),
                        "DS_ACCELERATOR": "cpu",
                        "OMP_NUM_THREADS": "1",
                    }
                    | (env or {}),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outputs = _collect(processes, timeout_s)
        for rank, process in enumerate(processes):
            if process.returncode != 0:
                raise AssertionError(
                    f"rank {rank} ended with {process.returncode}:\n{outputs[rank][-6000:]}"
                )
        return [
            pickle.loads((Path(folder) / f"result_{rank}.pickle").read_bytes())
            for rank in range(world_size)
        ]


def _collect(processes: list[subprocess.Popen[str]], timeout_s: float) -> list[str]:
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=timeout_s)[0])
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return outputs


def results_of(ranks: list[dict[str, Any]], name: str) -> list[Any]:
    """What every rank gave for a case; fails if it did not get there, or ended with a traceback."""
    missing = [
        f"rank {r}: {list(done.values())[-1]}" for r, done in enumerate(ranks) if name not in done
    ]
    assert not missing, "an earlier case failed\n" + "\n".join(missing)
    results = [done[name] for done in ranks]
    for rank, result in enumerate(results):
        assert not (isinstance(result, str) and "Traceback" in result), f"rank {rank}: {result}"
    return results


def run_cases(
    cases: dict[str, tuple[str, dict[str, Any]]], find: Callable[[str], Callable[..., Any]]
) -> dict[str, Any]:
    """Name -> result of cases run one after the other, or the text of what went wrong.

    A failure ends the list: the ranks may no longer be in step.

    Args:
        cases: name -> (name of a function, its arguments).
        find: the function of a name.
    """
    results: dict[str, Any] = {}
    for name, (function, arguments) in cases.items():
        try:
            results[name] = find(function)(**arguments)
        except Exception:
            results[name] = traceback.format_exc()
            break
    return results


class VirtualClock:
    """Time as data: every look at it costs `tick_s`, sleeping moves it on.

    Times are whole multiples of 2^-20 s, so that differences of them are exact in floating point
    whatever the clock shows: a resumed run measures what the unbroken one measured.
    """

    def __init__(self, tick_s: float = 2.0**-10) -> None:
        self._tick = round(tick_s * 2**20)
        self._now = 0

    def now_s(self) -> float:
        self._now += self._tick
        return self._now / 2**20

    def sleep(self, duration_s: float) -> None:
        self._now += round(duration_s * 2**20)
