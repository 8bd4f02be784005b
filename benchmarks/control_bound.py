"""What can following the link gain at most? An oracle against static densities, by arithmetic.

What limits the quantity: time to a loss is steps times step time, and both are flat around their
best density: the steps fall slowly with it, and the step time has a part that no density saves. So
a density between the best ones of two rates is nearly right for both.

    python benchmarks/control_bound.py --out results/control_bound_YYYYMM.json

A step is the plan's own model (ds_gradprune/controller/plan.py), the steps that a density needs
are `steps_factor` (worth.py), at step --age. A route gives each of its rates the same number of
steps, or, with "by time", the same time. The oracle knows the route and has the best density of
each rate, all chosen together; it pays nothing for finding out. `static` is the one density that
is best for this very route, in hindsight; `first` and `slowest` are the densities that are best
for the route's first and slowest rate, as a user would have found them on one day. Machines: nano
and micro have the computation, codec and bytes that were measured on the two cores of results/
(control_bed and ethernet pages); the others are assumptions, to see where a faster device leads.

The last line of stdout is one JSON document: {"rows": [{"machine", "prune", "route", "by",
"oracle", "static", "gain_static", "gain_first", "gain_slowest"}]}: densities, and times to the loss
over the oracle's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    # The root instead of this folder, whose files are scripts and no modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.control_lab.page import markdown_table
from benchmarks.netbed import parse_rate
from benchmarks.peers.crew import ROOT
from benchmarks.peers.page import machine, setting
from ds_gradprune.controller.plan import Prices, ladder
from ds_gradprune.controller.worth import steps_factor
from ds_gradprune.records import CHUNK_NUMEL

MACHINES: dict[str, tuple[float, float, float, float, float]] = {
    # compute s, codec s, codec s per unit of density, payload at density 1, dense bytes
    "nano, measured": (0.085, 0.011, 0.06, 1.1e6, 5.2e6),
    "micro, measured": (0.36, 0.07, 0.5, 27e6, 42e6),
    "micro, 12 times as fast": (0.03, 0.005, 0.05, 27e6, 42e6),
    "124M, 0.3 s a step": (0.3, 0.02, 0.2, 330e6, 500e6),
}

ROUTES = (
    "1gbit,200mbit,50mbit,500mbit",
    "1gbit,100mbit,20mbit,100mbit",
    "10gbit,1gbit,20mbit,1gbit",
)

By = Literal["steps", "time"]

OVERHEAD_S = 1e-3

DENSITIES = sorted({*map(ladder, range(4, 1025)), CHUNK_NUMEL})
"""Kept elements per chunk, 0.1 % to 25 %, and dense."""


def prices_at(name: str, rate_bps: float) -> Prices:
    """What a machine's step costs on a link, bits per second."""
    compute_s, codec_s, codec_per_density_s, payload_bytes, dense_bytes = MACHINES[name]
    return Prices(
        compute_s=compute_s,
        spread_s=0.0,
        codec_s=codec_s,
        codec_per_k_s=codec_per_density_s / CHUNK_NUMEL,
        dense_codec_s=0.0,
        overhead_s=OVERHEAD_S,
        seconds_per_byte=8.0 / rate_bps,
        noise=0.0,
        fixed_bytes=0.0,
        bytes_per_k=payload_bytes / CHUNK_NUMEL,
        dense_bytes=dense_bytes,
        dense_factor=1.0,
    )


def loss_s(route: Sequence[Prices], ks: Sequence[int], prune: str, age: int, by: By) -> float:
    """Time to a loss that takes one dense step on each rate, in any unit."""
    steps = [steps_factor(prune, k, age) for k in ks]
    times_s = [prices.step_s(k) for prices, k in zip(route, ks, strict=True)]
    if by == "time":
        return 1.0 / sum(1.0 / (n * t) for n, t in zip(steps, times_s, strict=True))
    # So many steps on each rate; a step with factor n is worth 1 / n of a dense one.
    return sum(times_s) / sum(1.0 / n for n in steps)


def oracle(route: Sequence[Prices], cost: Callable[[Sequence[int]], float]) -> list[int]:
    """The best density of each rate, one improved after the other until none can be."""
    ks = [min(DENSITIES, key=lambda k: cost([k] * len(route)))] * len(route)
    while True:
        before = list(ks)
        for place in range(len(ks)):
            choices = [[*ks[:place], k, *ks[place + 1 :]] for k in DENSITIES]
            ks = min(choices, key=cost)
        if ks == before:
            return ks


def row(name: str, prune: str, route: str, by: By, age: int) -> dict[str, Any]:
    """One machine on one route."""
    rates = [float(parse_rate(rate) or 0) for rate in route.split(",")]
    prices = [prices_at(name, rate) for rate in rates]

    def cost(ks: Sequence[int]) -> float:
        return loss_s(prices, ks, prune, age, by)

    def everywhere(k: int) -> float:
        return cost([k] * len(prices))

    def best_at(place: int) -> int:
        return min(DENSITIES, key=lambda k: loss_s([prices[place]], [k], prune, age, by))

    ks = oracle(prices, cost)
    static = min(DENSITIES, key=everywhere)
    slowest = best_at(rates.index(min(rates)))
    return {
        "machine": name,
        "prune": prune,
        "route": route,
        "by": by,
        "oracle": [k / CHUNK_NUMEL for k in ks],
        "static": static / CHUNK_NUMEL,
        "gain_static": everywhere(static) / cost(ks),
        "gain_first": everywhere(best_at(0)) / cost(ks),
        "gain_slowest": everywhere(slowest) / cost(ks),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For the screen and the page."""
    head = ["machine", "pruned", "rates", "by", "oracle", "best static", "it takes"]
    head += ["tuned for the first rate", "for the slowest"]
    lines = [head]
    for one in rows:
        line = [one["machine"], one["prune"], one["route"], one["by"]]
        line.append(", ".join(f"{density:.2%}" for density in one["oracle"]))
        line.append(f"{one['static']:.2%}")
        line += [f"{one[key]:.2f}" for key in ("gain_static", "gain_first", "gain_slowest")]
        lines.append(line)
    return markdown_table(lines)


def main() -> None:
    """Compute, print the table and the document, write the page."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--age", type=int, default=1000, help="steps that the run has lasted")
    flags.add_argument("--out", type=Path, help="JSON file; a page (.md) is put beside it")
    args = flags.parse_args()
    if args.age < 1:
        flags.error(f"--age must be at least 1, got {args.age}.")
    at_start = machine()
    bys: tuple[By, ...] = ("steps", "time")
    rows = [
        row(name, prune, route, by, args.age)
        for name in MACHINES
        for prune in ("gradient", "update")
        for route in ROUTES
        for by in bys
    ]
    shown = table(rows)
    print(shown)
    document = {"rows": rows}
    if args.out is not None:
        run = setting(ROOT, at_start)
        args.out.write_text(json.dumps({"setting": run, **document}, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(
            "# What following the link can gain at most\n\n"
            f"- command: `{run['command']}`\n- commit {run['commit']}, {run['date']}\n"
            f"- arithmetic, no measurement; step {args.age}; the last three columns are times to "
            f"the same loss over the oracle's\n\n{shown}\n"
        )
    print(json.dumps(document))


if __name__ == "__main__":
    main()
