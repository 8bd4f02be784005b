"""One picture per question, beside the JSON file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_gradprune.errors import MissingDependencyError
from labs.race.campaign import rate_mbit
from labs.race.figures import Figures, Row
from labs.race.methods import parse_method

MARKERS = "osD^v<>Px*"
COLORS = "tab20"
"""matplotlib's name of as many colors as there may be methods."""


def load_pyplot() -> Any:
    """Matplotlib without a screen.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as exc:
        raise MissingDependencyError(
            "Pictures need matplotlib: pip install matplotlib; or give --no-plots."
        ) from exc
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def write_all(figures: Figures, rows: Sequence[Row], stem: Path) -> list[Path]:
    """Draw everything that there are figures for.

    Args:
        figures: the runs.
        rows: of the table.
        stem: path without ending; "_loss.png" and so on is added.

    Returns:
        The files.
    """
    pyplot = load_pyplot()
    drawn = [
        (_losses(pyplot, figures, rows), "loss"),
        (_step_times(pyplot, rows), "rate"),
        (_densities(pyplot, figures), "density"),
    ]
    paths = []
    for picture, name in drawn:
        if picture is None:
            continue
        path = stem.with_name(f"{stem.name}_{name}.png")
        picture.savefig(path, dpi=110, bbox_inches="tight")
        pyplot.close(picture)
        paths.append(path)
    return paths


def _losses(pyplot: Any, figures: Figures, rows: Sequence[Row]) -> Any:
    """How fast does the loss fall on each link? The first round of each method."""
    rates = sorted({run.rate for run in figures.runs}, key=lambda rate: rate_mbit(rate) or math.inf)
    methods = list(dict.fromkeys(row.method for row in rows))
    picture, axes = pyplot.subplots(
        1, len(rates), figsize=(5 * len(rates), 4.2), squeeze=False, sharey=True
    )
    for axis, rate in zip(axes[0], rates, strict=True):
        axis.set_prop_cycle(color=pyplot.get_cmap(COLORS).colors)
        for method, marker in zip(methods, itertools.cycle(MARKERS), strict=False):
            curve = figures.curve(method, rate, 0)
            if curve is not None and len(curve) > 1:
                # All curves begin with the same loss, at 0, which a logarithm has no place for.
                times, losses = zip(*curve[1:], strict=True)
                axis.plot(
                    times, losses, marker=marker, markersize=4, label=parse_method(method).label
                )
        axis.set_title(rate or "unshaped")
        axis.set_xlabel("seconds of training")
        axis.grid(alpha=0.3)
        axis.set_xscale("log")
        _plain_ticks(axis.xaxis)
    axes[0][0].set_ylabel("validation loss")
    _name_beside(axes[0][0], axes[0][-1])
    return picture


def _step_times(pyplot: Any, rows: Sequence[Row]) -> Any:
    """How long is a step on which link?"""
    if all(row.rate_mbit is None for row in rows):
        return None
    picture, axis = pyplot.subplots(figsize=(6.5, 4.5))
    axis.set_prop_cycle(color=pyplot.get_cmap(COLORS).colors)
    methods = dict.fromkeys(row.method for row in rows)
    for method, marker in zip(methods, itertools.cycle(MARKERS), strict=False):
        mine = [row for row in rows if row.method == method]
        shaped = sorted((r.rate_mbit, r.step_time_s) for r in mine if r.rate_mbit is not None)
        (line,) = axis.plot(
            *zip(*shaped, strict=True), marker=marker, label=parse_method(method).label
        )
        for row in mine:
            if row.rate_mbit is None:
                axis.axhline(row.step_time_s, color=line.get_color(), linewidth=0.6, alpha=0.5)
    axis.set_xscale("log")
    axis.set_yscale("log")
    _plain_ticks(axis.xaxis)
    _plain_ticks(axis.yaxis)
    axis.set_xlabel("link, Mbit/s (thin lines: unshaped)")
    axis.set_ylabel("seconds per step, median")
    axis.grid(alpha=0.3, which="both")
    _name_beside(axis, axis)
    return picture


def _densities(pyplot: Any, figures: Figures) -> Any:
    """What did the controller do over time?"""
    runs = [run for run in figures.runs if parse_method(run.method).adaptive and run.round == 0]
    if not runs:
        return None
    picture, axis = pyplot.subplots(figsize=(6.5, 4.5))
    for run in runs:
        steps = [*run.opening.steps, *run.rest.steps]
        ends_s = list(itertools.accumulate(step.wall_s for step in steps))
        mbit = rate_mbit(run.rate)
        label = f"{run.method}, " + ("unshaped" if mbit is None else f"{mbit:g} Mbit/s")
        dash = "-" if parse_method(run.method).prune == "gradient" else "--"
        densities = [step.density or 1.0 for step in steps]
        axis.step(ends_s, densities, dash, where="pre", label=label)
    axis.set_yscale("log")
    _plain_ticks(axis.yaxis)
    axis.set_xlabel("seconds of training")
    axis.set_ylabel("density (1: dense)")
    axis.grid(alpha=0.3, which="both")
    _name_beside(axis, axis)
    return picture


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10 on a logarithmic axis; its own names for what lies between cover each other."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _name_beside(whose: Any, last: Any) -> None:
    """The names of one panel's lines, to the right of the last panel: so they cover nothing."""
    handles, labels = whose.get_legend_handles_labels()
    last.legend(handles, labels, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
