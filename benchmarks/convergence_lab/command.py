"""The command: a grid file in, a table, a picture and a page out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.convergence_lab import page, plot
from benchmarks.convergence_lab.base import Setting
from benchmarks.convergence_lab.gpt import HAS_BF16_PRODUCTS, Gpt
from benchmarks.convergence_lab.grid import Grid, Sent, read_grid
from benchmarks.convergence_lab.store import Store, run_key
from benchmarks.convergence_lab.table import rows_of
from benchmarks.convergence_lab.text import Text
from benchmarks.convergence_lab.trial import run_trial
from benchmarks.convergence_lab.wire import is_real
from ds_gradprune.codec import base
from ds_gradprune.errors import ConfigError, GradPruneError

RUNS = "convergence_runs.jsonl"
"""Finished runs of all grids whose --out lies in one folder: a dense run serves them all."""


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every command on a grid has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", type=Path, required=True, help="JSON, see convergence_lab/grid")
    parser.add_argument("--text", type=Path, required=True, help="any file; its bytes are tokens")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps of a run")
    parser.add_argument("--workers", type=int, default=4, help="simulated hosts")
    return parser


def main(description: str | None) -> int:
    """Run what the flags say; exit code 2 with one line for what a user can cause."""
    parser = parser_of(description)
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. K - 1")
    parser.add_argument("--out", type=Path, required=True, help="JSON; page and picture beside it")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 keeps figures equal")
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
    """Make the runs that are missing, seed by seed, and write everything."""
    grid = read_grid(options.grid)
    _check(options, grid)
    torch.set_num_threads(options.threads)
    text = Text(options.text, grid.model.context)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    store = Store(options.out.with_name(RUNS))
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        curves: dict[str, list[list[float]]] = {}
        for method in grid.with_dense():
            runs.append(_one(options, grid, method, seed, text, store, curves))
            result = _publish(options, grid, text, runs)  # what there is, should we be stopped
    return result


def _publish(
    options: argparse.Namespace, grid: Grid, text: Text, runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write result, picture and page of the runs so far; the dense runs come first."""
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
        "environment": page.environment(),
        "grid": json.loads(options.grid.read_text(encoding="utf-8")),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    picture = None
    if not options.no_plot:
        picture = options.out.with_suffix(".png")
        plot.draw(rows, picture)
    page.write(result, options.out.with_suffix(".md"), picture, sys.argv)
    return result


def _check(options: argparse.Namespace, grid: Grid) -> None:
    faults = [
        f"--{name} must be at least {least}, got {getattr(options, name)}."
        for name, least in (("steps", 8), ("seeds", 1), ("workers", 2), ("threads", 1))
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


def _one(
    options: argparse.Namespace,
    grid: Grid,
    method: Any,
    seed: int,
    text: Text,
    store: Store,
    curves: dict[str, list[list[float]]],
) -> dict[str, Any]:
    """A run from the store, or made now and stored."""
    train = grid.train_of(method)
    settings = train.model_dump()
    real = isinstance(method, Sent) and is_real(method)
    key = run_key(
        **({"codec": base.VERSION} if real else {}),
        # Without defaults: a new field leaves the keys of earlier runs as they are.
        method=method.model_dump(exclude={"name", "train"}, exclude_defaults=True),
        model=grid.model.model_dump(),
        train=settings,
        steps=options.steps,
        workers=options.workers,
        seed=seed,
        text=text.digest,
    )
    run = store.get(key)
    if run is None:
        gpt = Gpt(grid.model, text.vocab_size)
        setting = Setting(gpt, train, options.workers, options.steps, seed)
        print(f"{method.name}, seed {seed} ...", file=sys.stderr, flush=True)
        figures = run_trial(
            setting,
            method,
            text,
            reference=curves.get(str(train.of_dense())),
            give_up_pct=grid.give_up_pct,
        )
        run = {"key": key, "method": method.name, "seed": seed, "numel": gpt.numel, **figures}
        run |= {"kind": method.label(), "train": settings, "load": os.getloadavg()[0]}
        run |= {"simulated_values": isinstance(method, Sent) and not real}
        run |= {"commit": page.environment()["commit"], "workers": options.workers}
        run |= {"has_bf16_products": HAS_BF16_PRODUCTS}
        store.add(run)
    run = {**run, "method": method.name}
    if method.label() == "dense":
        curves[str(train.of_dense())] = run["curve"]
    stop = "" if run["stopped_at"] is None else f", ended at step {run['stopped_at']}"
    print(
        f"{method.name}, seed {seed}: {run['bits_per_param']:.3g} bits, loss "
        f"{run['val_loss']:.4f} ({run['val_loss_flushed']:.4f} after a last exchange), "
        f"{run['run_s']:.0f} s{stop}",
        file=sys.stderr,
        flush=True,
    )
    return run
