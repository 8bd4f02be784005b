"""The command: a grid file in, a table, a picture and a page out."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_gradprune.errors import ConfigError, GradPruneError
from labs.convergence import page, plot
from labs.convergence.base import Setting
from labs.convergence.gpt import HAS_BF16_PRODUCTS, Gpt
from labs.convergence.grid import Grid, Method, Train, read_grid
from labs.convergence.store import Store, keys_of
from labs.convergence.table import comparable, rows_of
from labs.convergence.text import Text
from labs.convergence.trial import can_stack, run_stack, run_trial

RUNS = "convergence_runs.jsonl"
"""Finished runs of all grids whose --out lies in one folder: a dense run serves them all."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One run of the grid.

    Attributes:
        method: of the grid.
        seed: of weights and data.
        key: in the store.
        first_key: of the same run in the first laboratory, if it had such a method.
    """

    method: Method
    seed: int
    key: str
    first_key: str | None


def main(description: str | None) -> int:
    """Run what the flags say; exit code 2 with one line for what a user can cause."""
    parser = argparse.ArgumentParser(
        prog="python -m labs.convergence",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--grid", type=Path, required=True, help="JSON, see labs/convergence/grid")
    parser.add_argument("--text", type=Path, required=True, help="any file; its bytes are tokens")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps of a run")
    parser.add_argument("--workers", type=int, default=4, help="simulated hosts")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. S - 1")
    parser.add_argument("--out", type=Path, required=True, help="JSON; page and picture beside it")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one process each")
    parser.add_argument("--device", default="cpu", help="where the workers train")
    parser.add_argument("--exchange-device", default="cpu", help="where the product exchanges")
    parser.add_argument(
        "--stored", action="store_true", help="make no run: a page of what is there"
    )
    parser.add_argument("--no-plot", action="store_true", help="no picture, needs no matplotlib")
    options = parser.parse_args()
    try:
        result = run_grid(options)
    except GradPruneError as exc:
        print(exc, file=sys.stderr)
        return 2
    print(json.dumps({"rows": result["rows"]}))
    return 0


def run_grid(options: argparse.Namespace) -> dict[str, Any]:
    """Make the runs that are missing, seed by seed, and write everything after each of them."""
    grid = read_grid(options.grid)
    _check(options, grid)
    text = Text(options.text, grid.model.context)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    store = Store(options.out.with_name(RUNS))
    every = [
        wanted_run(
            grid,
            method,
            steps=options.steps,
            workers=options.workers,
            seed=seed,
            text=text.digest,
            device=options.device,
        )
        for seed in range(options.seeds)
        for method in grid.with_dense()
    ]
    found = {number: _stored(store, wanted) for number, wanted in enumerate(every)}
    runs = {number: run for number, run in found.items() if run is not None}
    result: dict[str, Any] = {}

    def publish() -> None:
        nonlocal result
        ready = comparable([runs[number] for number in sorted(runs)])
        if ready:
            result = _publish(options, grid, text, ready)

    publish()
    if options.stored:
        if not result:
            raise ConfigError(
                [f"--stored needs a dense run of the grid in {store.path}, got none."]
            )
        return result
    missing = {number: wanted for number, wanted in enumerate(every) if number not in runs}
    for number, run in _made(options, grid, missing):
        store.add(run)
        runs[number] = run
        _say(run)
        publish()  # what there is, should we be stopped
    return result


def wanted_run(grid: Grid, method: Method, *, seed: int, **where: Any) -> Wanted:
    """A run of the grid; `where` as `store.keys_of` takes it."""
    key, first_key = keys_of(grid, method, seed=seed, **where)
    return Wanted(method, seed, key, first_key)


def _stored(store: Store, wanted: Wanted) -> dict[str, Any] | None:
    """A finished run, under the name that this grid gives its method."""
    run, is_first = store.get(wanted.key), False
    if run is None and wanted.first_key is not None:
        run, is_first = store.get(wanted.first_key), True
    return run and {**run, "method": wanted.method.name, "first_lab": is_first}


def _made(
    options: argparse.Namespace, grid: Grid, missing: dict[int, Wanted]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Make runs, in order with one job, else as they end."""
    where = (options.device, options.exchange_device)
    make = functools.partial(make_runs, grid, options.text, options.steps, options.workers, *where)
    if options.jobs == 1:
        torch.set_num_threads(1)
        for number, wanted in missing.items():
            yield number, make([wanted])[0]
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        options.jobs, context, initializer=torch.set_num_threads, initargs=(1,)
    )
    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        numbers = {pool.submit(make, [wanted]): number for number, wanted in missing.items()}
        for future in as_completed(numbers):
            yield numbers[future], future.result()[0]


def make_runs(
    grid: Grid,
    path: Path,
    steps: int,
    workers: int,
    device: str,
    exchange_device: str,
    wanted: Sequence[Wanted],
) -> list[dict[str, Any]]:
    """Runs and everything that their records say, in this process; side by side if they can."""
    text = _text(path, grid.model.context)
    gpt = Gpt(grid.model, text.vocab_size)
    trains = [grid.train_of(one.method) for one in wanted]
    settings = [
        Setting(gpt, train, workers, steps, one.seed, device, exchange_device)
        for one, train in zip(wanted, trains, strict=True)
    ]
    methods = [one.method for one in wanted]
    if len(wanted) > 1 and all(can_stack(method) for method in methods):
        figures = run_stack(settings, methods, text)
    else:
        figures = [run_trial(*pair, text) for pair in zip(settings, methods, strict=True)]
    runs = zip(wanted, trains, figures, strict=True)
    return [_record(one, gpt.numel, workers, device, train, own) for one, train, own in runs]


def _record(
    wanted: Wanted,
    numel: int,
    workers: int,
    device: str,
    train: Train,
    figures: dict[str, Any],
) -> dict[str, Any]:
    where = {} if device == "cpu" else {"environment": page.environment()}
    return {
        "key": wanted.key,
        "method": wanted.method.name,
        "seed": wanted.seed,
        "numel": numel,
        **figures,
        "kind": wanted.method.label,
        "settings": wanted.method.settings(),
        "train": train.model_dump(),
        "load": os.getloadavg()[0],
        "commit": page.commit_of_this(),
        "workers": workers,
        "device": device_name(device),
        **where,
        "has_bf16_products": HAS_BF16_PRODUCTS,
    }


def device_name(device: str) -> str:
    """What trained, for the record: "cpu", or the accelerator's name."""
    return device if device == "cpu" else torch.cuda.get_device_name(device)


@functools.lru_cache(maxsize=1)
def _text(path: Path, context: int) -> Text:
    return Text(path, context)


def _publish(
    options: argparse.Namespace, grid: Grid, text: Text, runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write result, picture and page of the runs so far."""
    rows = rows_of(runs)
    result = {
        "question": grid.question,
        "rows": rows,
        "runs": len(runs),
        "runs_wanted": options.seeds * len(grid.with_dense()),
        "steps": options.steps,
        "workers": options.workers,
        "model": grid.model.model_dump(),
        "train": grid.train.model_dump(),
        "numel": runs[0]["numel"],
        "text": {"digest": text.digest, "vocab_size": text.vocab_size},
        "run_s": sum(run["run_s"] for run in runs),
        "cpu_s": sum(run["cpu_s"] for run in runs),
        "environment": runs[0].get("environment") or page.environment(),
        "device": runs[0].get("device", "cpu"),
        "grid": json.loads(options.grid.read_text(encoding="utf-8")),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    picture = None
    if not options.no_plot:
        picture = options.out.with_suffix(".png")
        plot.draw(rows, picture)
    page.write(result, options.out.with_suffix(".md"), picture, sys.argv[1:])
    return result


def _check(options: argparse.Namespace, grid: Grid) -> None:
    faults = [
        f"--{name} must be at least {least}, got {getattr(options, name)}."
        for name, least in (("steps", 8), ("seeds", 1), ("workers", 2), ("jobs", 1))
        if getattr(options, name) < least
    ]
    longest = max(grid.train_of(m).warmup_steps for m in grid.methods)
    if longest >= options.steps:
        faults.append(
            f"--steps must be above train.warmup_steps ({longest}), got {options.steps}: nothing "
            "would be pruned."
        )
    if faults:
        raise ConfigError(faults)


def _say(run: dict[str, Any]) -> None:
    stop = "" if run["stopped_at"] is None else f", ended at step {run['stopped_at']}"
    print(
        f"{run['method']}, seed {run['seed']}: {run['bits_per_param']:.3g} bits, loss "
        f"{run['val_loss']:.4f} ({run['val_loss_flushed']:.4f} after a last exchange), "
        f"{run['run_s']:.0f} s, {run['cpu_s']:.0f} s of CPU{stop}",
        file=sys.stderr,
        flush=True,
    )
