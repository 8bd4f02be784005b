"""Many grids in a given time: stacks of runs on one accelerator, most valuable first.

    python -m labs.convergence.campaign --plan labs/convergence/plans/gpu.json --text FILE \
        --device cuda --jobs 13 --start-before-s 225 --end-s 255 --out FOLDER

A plan is JSON, see `plan.Plan`: cases, and jobs in the order of their worth. A case is a grid with
a number of islands, steps and seeds. Its dense runs are made first, at every learning rate that it
names. The best of them, by the mean validation loss, is its methods' learning rate.

Every finished run is one line of convergence_runs.jsonl in the folder, with the key that the
laboratory gives it, and a line on the screen. When the time is over what runs is lost, and what has
ended is there. The pages are made afterwards by the laboratory itself, from those lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from ds_gradprune.errors import GradPruneError
from ds_gradprune.native.library import kernels
from labs.convergence import recorded
from labs.convergence.command import RUNS, Wanted, make_runs, wanted_run
from labs.convergence.grid import Dense, Grid, Method, read_grid
from labs.convergence.plan import Job, Plan, read_plan
from labs.convergence.store import Store
from labs.convergence.text import Text

_HOW = (("fork", True), ("spawn", True), ("spawn", False))
"""How a job's process is started, and whether passes are recorded: the quickest way first. A job
that fails is tried in the next way; so are all others, if the first has never worked."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """What one process is given.

    Attributes:
        case: name of the case.
        grid: with the learning rate that holds.
        wanted: the runs.
        way: how it is started, see `_HOW`.
    """

    case: str
    grid: Grid
    wanted: list[Wanted]
    way: int = 0


class Campaign:
    """A plan under way.

    Args:
        options: of the command.
        plan: see there.
        folder: where the plan's grids are looked for.
    """

    def __init__(self, options: argparse.Namespace, plan: Plan, folder: Path) -> None:
        self._options = options
        self._plan = plan
        self._grids = {name: read_grid(folder / case.grid) for name, case in plan.cases.items()}
        self._text = {
            name: Text(options.text, grid.model.context) for name, grid in self._grids.items()
        }
        self._store = Store(options.out / RUNS)
        self._began_s = time.perf_counter()
        self._losses: dict[str, dict[float, list[float]]] = {name: {} for name in plan.cases}
        self._ready: set[str] = set()
        self._dense_running = self._least_way = 0
        self._worked: set[int] = set()
        self._again: list[_Batch] = []
        self._jobs = list(plan.jobs)

    @property
    def age_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._began_s

    def run(self) -> bool:
        """Make what time allows; whether everything was made."""
        options = self._options
        running: dict[Any, tuple[_Batch, BaseProcess]] = {}
        while True:
            while len(running) < options.jobs and self.age_s < options.start_before_s:
                batch = self._next()
                if batch is None:
                    break
                batch = dataclasses.replace(batch, way=max(batch.way, self._least_way))
                here, process = self._start(batch)
                running[here] = (batch, process)
            if not running:
                break
            ended = wait(list(running), max(0.0, options.end_s - self.age_s))
            if not ended:
                self._say(f"time is over: {len(running)} jobs are lost")
                for _, process in running.values():
                    process.kill()
                return False
            for end in ended:
                batch, process = running.pop(end)
                self._take(batch, _answer(end))
                process.join()
        left = len(self._jobs) + len(self._again)
        self._say(f"{left} jobs were not started")
        return not left

    def _start(self, batch: _Batch) -> tuple[Connection, BaseProcess]:
        # A process of its own: a broken context of the accelerator ends with its job. A forked one
        # has everything imported; here nobody has touched the accelerator.
        start, is_recorded = _HOW[batch.way]
        context: Any = multiprocessing.get_context(start)
        here, there = context.Pipe(duplex=False)
        options, case = self._options, self._plan.cases[batch.case]
        where = (case.steps, case.workers, options.device, options.exchange_device)
        call = functools.partial(make_runs, batch.grid, options.text, *where, batch.wanted)
        process = context.Process(target=_work, args=(there, call, is_recorded))
        process.start()
        there.close()
        return here, process

    def _take(self, batch: _Batch, answer: list[dict[str, Any]] | str) -> None:
        """Write down what a process has made. A failed job is tried again in another way."""
        if isinstance(answer, str):
            self._say(f"{batch.case}: {batch.wanted[0].method.name}: {answer}")
            if batch.way + 1 < len(_HOW):
                self._again.append(dataclasses.replace(batch, way=batch.way + 1))
                if batch.way not in self._worked:
                    self._least_way = max(self._least_way, batch.way + 1)
                return
            answer = []
        else:
            self._worked.add(batch.way)
        for run in answer:
            self._store.add({**run, "case": batch.case})
            if run["kind"] == "dense":
                self._note_dense(batch.case, run)
            stop = "" if run["stopped_at"] is None else f", ended at step {run['stopped_at']}"
            self._say(
                f"{batch.case}: {run['method']}, lr {run['train']['lr']:g}, seed {run['seed']}: "
                f"{run['bits_per_param']:.3g} bits, loss {run['val_loss']:.4f}, "
                f"share {run['run_s']:.1f} s{stop}"
            )
        if batch.wanted[0].method.label == "dense":
            self._ready.add(batch.case)
            self._dense_running -= 1

    def _next(self) -> _Batch | None:
        """The first job that need not wait and has runs to be made."""
        if self._again:
            return self._again.pop(0)
        for job in list(self._jobs):
            if not job.methods and self._dense_running >= self._plan.dense_at_once:
                continue
            if job.methods and not (job.case in self._ready and self._losses[job.case]):
                continue
            self._jobs.remove(job)
            batch = self._of_methods(job) if job.methods else self._of_dense(job)
            missing = self._missing(batch.wanted, job.case)
            if missing:
                self._dense_running += not job.methods
                return dataclasses.replace(batch, wanted=missing)
            if not job.methods:  # all there: others need not wait any more
                self._ready.add(job.case)
                return self._next()
        return None

    def _of_dense(self, job: Job) -> _Batch:
        case, first = self._plan.cases[job.case], self._grids[job.case]
        wanted = [
            self._wanted(job.case, first, Dense(kind="dense", name="dense", train={"lr": lr}), seed)
            for lr in case.lrs
            for seed in range(case.seeds)
        ]
        return _Batch(job.case, first, wanted)

    def _of_methods(self, job: Job) -> _Batch:
        losses = self._losses[job.case]
        best = min(losses, key=lambda lr: statistics.fmean(losses[lr]))
        grid = self._grids[job.case]
        train = grid.train.model_copy(update={"lr": best * job.lr_factor})
        grid = grid.model_copy(update={"train": train})
        named = {method.name: method for method in grid.methods}
        seeds = job.seeds or range(self._plan.cases[job.case].seeds)
        wanted = [
            self._wanted(job.case, grid, named[method], seed)
            for method in job.methods
            for seed in seeds
        ]
        return _Batch(job.case, grid, wanted)

    def _missing(self, wanted: list[Wanted], name: str) -> list[Wanted]:
        missing = []
        for one in wanted:
            run = self._store.get(one.key)
            if run is None:
                missing.append(one)
            elif run["kind"] == "dense":
                self._note_dense(name, run)
        return missing

    def _note_dense(self, name: str, run: dict[str, Any]) -> None:
        loss = float("inf") if run["stopped_at"] is not None else run["val_loss"]
        self._losses[name].setdefault(run["train"]["lr"], []).append(loss)

    def _wanted(self, name: str, grid: Grid, method: Method, seed: int) -> Wanted:
        case = self._plan.cases[name]
        return wanted_run(
            grid,
            method,
            steps=case.steps,
            workers=case.workers,
            seed=seed,
            text=self._text[name].digest,
            device=self._options.device,
        )

    def _say(self, line: str) -> None:
        print(f"{self.age_s:6.1f} s  {line}", flush=True)


def _work(end: Connection, call: Callable[[], list[dict[str, Any]]], is_recorded: bool) -> None:
    """What a job's process does: answer with its runs, or with the words of its failure."""
    torch.set_num_threads(1)
    recorded.is_on = is_recorded
    try:
        end.send(call())
    except Exception:
        end.send(traceback.format_exc())
    end.close()


def _answer(end: Connection) -> list[dict[str, Any]] | str:
    try:
        answer: list[dict[str, Any]] | str = end.recv()
    except EOFError:
        return "the process has ended without an answer"
    return answer


def main() -> int:
    """Run what the flags say."""
    parser = argparse.ArgumentParser(
        prog="python -m labs.convergence.campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", type=Path, required=True, help="JSON")
    parser.add_argument("--text", type=Path, required=True, help="any file; its bytes are tokens")
    parser.add_argument("--device", default="cpu", help="where the workers train")
    parser.add_argument("--exchange-device", default="cpu", help="where the product exchanges")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--start-before-s", type=float, required=True, help="no job starts later")
    parser.add_argument("--end-s", type=float, required=True, help="what still runs then is lost")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    options = parser.parse_args()
    try:
        plan = read_plan(options.plan)
        options.out.mkdir(parents=True, exist_ok=True)
        kernels()  # built once, before the processes
        campaign = Campaign(options, plan, options.plan.parent)
    except GradPruneError as exc:
        print(exc, file=sys.stderr)
        return 2
    return 0 if campaign.run() else 1


if __name__ == "__main__":
    sys.exit(main())
