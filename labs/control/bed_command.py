"""Ours against static densities on a real link whose rate changes while it trains.

What limits the quantity: the link carries rate / 8 bytes per second, and a static density is right
for one rate only; what a changing density gains is what each static one loses on the other rates.
Every method trains the same model on the same tokens in the same order, through the same rates:
--by steps gives each rate the same share of the steps, --by time changes the rate on the training's
own clock, as a network would.

    sudo python -m labs.control bed --rates 1gbit,200mbit,50mbit,500mbit --text FILE

Needs root and what tools/netbed needs; `--bed none` runs unshaped on the loopback interface, to try
the command. Every step's times are in the JSON file of --out, and `python -m labs.control --replay
FILE` plays the link that was recorded to all laws.

The last line of stdout is one JSON document: for each method `wall_s`, `wall_s_to_loss` (null:
never), `val_loss`, `in_budget`, `density_min`, `density_max`, `changes`; and `speedup`: the best
static density's time to the loss over ours. The loss is the worst final one of the static densities
and ours, so all that did not diverge reach it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_gradprune.errors import ConfigError
from labs.control import page
from labs.control.bed import Route, Trip, drive, summarize
from labs.control.page import markdown_table, text_table
from labs.machine import machine
from labs.race.command import LEARNING_RATES, answer, make_recipe, open_place, say
from labs.race.crew import ROOT, crew
from labs.race.methods import parse_methods
from labs.race.page import setting
from labs.race.plots import load_pyplot
from textgen.model import SIZES
from textgen.prepare import prepare
from tools.netbed import parse_rate

OURS = "ours"
HEADS = {
    "wall_s": "all s",
    "wall_s_to_loss": "s to the loss",
    "val_loss": "val. loss",
    "in_budget": "in budget",
    "density_min": "least density",
    "density_max": "most",
    "changes": "changes",
}


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        prog="python -m labs.control bed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = flags.add_argument
    add("--hosts", type=int, default=2, help="2 to 8, one rank each (default: 2)")
    add("--rates", default="1gbit,200mbit,50mbit,500mbit", help="of every link, in this order")
    add("--by", choices=("steps", "time"), default="steps", help="what each rate lasts")
    add("--each-s", type=float, default=60.0, help="--by time: seconds of training at each rate")
    add("--static", default="0.2,0.05,0.01,0.002", help="static densities to compare with")
    add("--model", default="nano", choices=sorted(SIZES), help="default: nano")
    add("--steps", type=int, default=600, help="of each run (default: 600)")
    add("--repeats", type=int, default=1, help="rounds, each with its own seed (default: 1)")
    add("--text", type=Path, help="UTF-8 file or folder (default: the embedded text)")
    add("--out", type=Path, help="JSON file; a page (.md) and a picture are put beside it")
    add("--bed", choices=("netns", "none"), default="netns", help="none: loopback, unshaped")
    add("--batch", type=int, default=4, help="sequences per rank and step (default: 4)")
    add("--lr", type=float, help=f"for all methods (default, by model: {LEARNING_RATES})")
    add("--beta2", type=float, default=0.99, help="of AdamW, for all methods (default: 0.99)")
    add("--eval-sequences", type=int, help="of a validation (default: textgen's own number)")
    add("--dense-steps", type=int, default=40, help="before pruning begins (default: 40)")
    add("--eval-every", type=int, default=20, help="steps between validations (default: 20)")
    add("--budget-s", type=float, help="step time budget of ours (default: its own default)")
    add("--no-plots", action="store_true", help="draw nothing; needs no matplotlib")
    flags.set_defaults(zero_stage=0)
    return flags


def make_route(flags: argparse.Namespace) -> Route:
    """Which rate holds when.

    Raises:
        ConfigError: a flag is out of range; lists every fault.
    """
    faults = []
    for name, least in (
        ("hosts", 2),
        ("steps", 8),
        ("repeats", 1),
        ("batch", 1),
        ("eval_every", 1),
    ):
        if getattr(flags, name) < least:
            shown = name.replace("_", "-")
            faults.append(f"--{shown} must be at least {least}, got {getattr(flags, name)}.")
    if not faults and flags.steps % flags.eval_every:
        faults.append(f"--steps must be a multiple of --eval-every, got {flags.steps}.")
    if not 2 <= flags.dense_steps <= flags.steps - 2:
        faults.append(f"--dense-steps must be 2 to {flags.steps - 2}, got {flags.dense_steps}.")
    if not flags.each_s > 0.0:
        faults.append(f"--each-s must be above 0, got {flags.each_s:g}.")
    if faults:
        raise ConfigError(faults)
    rates: tuple[str | None, ...] = (None,)
    if flags.bed == "netns":
        names = [rate.strip() for rate in flags.rates.split(",")]
        rates = tuple(None if parse_rate(name) is None else name for name in names)
    return Route(rates, flags.steps, flags.by, flags.each_s)


def run(flags: argparse.Namespace) -> dict[str, Any]:
    """Make all runs, print the table, write the files.

    Returns:
        The document of the last line.

    Raises:
        GradPruneError: the bed, the flags or a run failed.
    """
    route = make_route(flags)
    static = [f"topk_{text.strip()}" for text in flags.static.split(",")]
    methods = parse_methods(",".join([OURS, *static]))
    if flags.out is not None and not flags.no_plots:
        load_pyplot()  # missing: say so now, not after an hour
    recipe = make_recipe(flags, flags.dense_steps)
    at_start, trips = machine(), []
    with open_place(flags) as place, tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(data, flags.text, flags.model)
        for seed in range(flags.repeats):
            turn = seed % len(methods)
            for method in [*methods[turn:], *methods[:turn]]:
                say(f"round {seed + 1} of {flags.repeats}: {method.name}")
                with crew(place, method.name, recipe, data, seed) as ranks:
                    trips.append(drive(method.name, seed, route, ranks, flags.eval_every))
    document = summarize(trips, OURS, flags.budget_s)
    rows = rows_of(document["methods"])
    print(text_table(rows))
    if flags.out is not None:
        about = setting(ROOT, at_start) | {
            "route": dataclasses.asdict(route),
            "recipe": dataclasses.asdict(recipe),
        }
        write_files(flags, about, document, trips)
    return document


def rows_of(methods: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A head and one row for each method."""
    rows = [["method", *HEADS.values()]]
    for name, figures in methods.items():
        cells = ["-" if figures[key] is None else f"{figures[key]:.4g}" for key in HEADS]
        if figures["wall_s_to_loss"] is None:
            cells[list(HEADS).index("wall_s_to_loss")] = "never"
        rows.append([name, *cells])
    return rows


def write_files(
    flags: argparse.Namespace,
    about: dict[str, Any],
    document: dict[str, Any],
    trips: Sequence[Trip],
) -> None:
    """JSON with every step, ours first; the page; the picture of ours on the changing link."""
    out: Path = flags.out
    out.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(trips, key=lambda trip: trip.method != OURS)
    runs = [trip.to_json() for trip in ordered]
    out.write_text(json.dumps({"setting": about, **document, "runs": runs}) + "\n")
    pictures = []
    if not flags.no_plots:
        pictures.append(out.with_suffix(".png"))
        draw(ordered[0], pictures[0])
    speedup = "not known" if document["speedup"] is None else f"{document['speedup']:.2f}"
    facts = [
        f"{flags.hosts} hosts; {flags.model}, {flags.steps} steps, {flags.dense_steps} of them "
        f"dense; rates {flags.rates} by {flags.by}; {flags.repeats} rounds, medians",
        f"the best static density's time to the loss over ours: {speedup}",
    ]
    parts = [markdown_table(rows_of(document["methods"]))]
    page.write(
        out, "Ours and static densities on a link that changes", about, facts, parts, pictures
    )


def draw(trip: Trip, path: Path) -> None:
    """Rate, density and step time over the steps."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(9, 6))
    numbers = [step.step for step in trip.steps]
    rates = [parse_rate(rate) for rate in trip.rates]
    shown = [float("nan") if rate is None else rate / 1e6 for rate in rates]
    densities = [1.0 if step.density is None else step.density for step in trip.steps]
    for axis, values, label in (
        (axes[0], shown, "link, Mbit/s"),
        (axes[1], densities, "density"),
        (axes[2], [step.wall_s for step in trip.steps], "step, s"),
    ):
        axis.plot(numbers, values, lw=1.0)
        axis.set_ylabel(label)
    axes[0].set_yscale("log")
    axes[1].set_yscale("log")
    axes[2].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    flags = parser().parse_args(arguments)
    return answer(lambda: run(flags))
