"""The picture of `overview`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labs.convergence.plot import pyplot_of
from labs.convergence.recipes import defaults, others, peers

TARGETS = ((0.03, 0.5, 2), (0.06, 0.3, 2), (0.1, 1.0, 4), (0.5, 0.3, 4))
"""What is asked for: bits, gap in percent, number of islands."""

CHANCE = 0.35
"""Percent that chance moves the gap of one run by (LOG.md, 2026-11-26)."""

_HIGHEST = 4.0
"""Percent. Gaps above it are outside of the picture."""

_COLOURS = {2: "Blues", 4: "Reds"}
"""By the number of islands."""


def draw(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    pyplot = pyplot_of()
    picture, axis = pyplot.subplots(figsize=(10, 6.5))
    axis.axhspan(-CHANCE, CHANCE, color="0.93", zorder=0)
    axis.text(0.0185, -0.31, "chance moves one run so much", fontsize=7, color="0.45")
    for case in cases:
        _draw_case(axis, case, pyplot.get_cmap(_COLOURS.get(case["workers"], "Purples")))
    for bits, gap, islands in TARGETS:
        axis.plot([bits / 1.3, bits], [gap, gap], color="0.5", lw=4, alpha=0.45, zorder=1)
        words = f"asked of {islands}"
        axis.text(bits / 1.3, gap - 0.13, words, fontsize=6.5, color="0.4", va="bottom")
    axis.axhline(0.0, color="grey", lw=0.8)
    axis.set_xscale("log")
    axis.set_xlim(0.017, 3.6)
    axis.set_ylim(-0.45, _HIGHEST)
    ticks = (0.02, 0.03, 0.06, 0.1, 0.2, 0.5, 1, 2)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(
        "bits that an island receives per parameter and step (dense training: 32 with two, 48 with "
        "four)"
    )
    axis.set_ylabel("final validation loss above dense training's, %")
    above = axis.secondary_xaxis("top", functions=(_megabytes, _bits))
    above.set_xticks([_megabytes(tick) for tick in ticks])
    above.set_xticklabels([f"{_megabytes(tick):.2g}" for tick in ticks])
    above.minorticks_off()
    above.set_xlabel("MB per step of a model of 100M parameters (dense training: 400 and 600)")
    axis.set_title(
        "filled: the default, in rounds of 10 steps, of 5, and in every step, from the left;\n"
        "hollow: the best of other forms; crosses: peers; bars: standard error",
        fontsize=9,
    )
    axis.grid(alpha=0.25)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, fontsize=8, frameon=False)
    picture.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(picture)


def _draw_case(axis: Any, case: dict[str, Any], colours: Any) -> None:
    """One case: its recipes as a line, its other forms hollow, its peers as crosses."""
    shade = 0.45 + 0.17 * max(0.0, math.log10(case["numel"] / 1.5e5))
    colour = colours(min(1.0, shade))
    rows = defaults(case)
    mark = "*" if case["tuned"] else ("s" if case["tokens"] > 256 else "o")
    if case["tuned"]:
        colour = "tab:purple" if case["adapters"] else "tab:green"
    line = "-" if len(rows) > 1 else ""
    if rows:
        axis.errorbar(
            *_places(rows),
            yerr=[row["error"] for row in rows],
            fmt=f"{mark}{line}",
            color=colour,
            mec="white",
            ms=13 if case["tuned"] else 8,
            capsize=3,
            label=case["name"],
            zorder=3,
        )
    for row in others(case):
        if row["gap_pct"] <= _HIGHEST:
            style = {"fmt": mark, "color": colour, "mfc": "white", "ms": 5, "lw": 0.8, "zorder": 2}
            axis.errorbar(*_places([row]), yerr=row["error"], capsize=2, **style)
    for row in peers(case):
        if row["gap_pct"] <= _HIGHEST:
            axis.errorbar(*_places([row]), yerr=row["error"], fmt="x", color=colour, capsize=3)
            axis.annotate(
                f"{row['method']}, {case['workers']} x {case['numel'] / 1e6:.3g}M",
                (row["bits_per_param"], row["gap_pct"]),
                fontsize=7,
                xytext=(6, 3 if case["workers"] == 4 else -9),
                textcoords="offset points",
            )


def _places(rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["bits_per_param"] for row in rows], [row["gap_pct"] for row in rows]


def _megabytes(bits: float) -> float:
    """Of a step of 100M parameters."""
    return bits * 12.5


def _bits(megabytes: float) -> float:
    return megabytes / 12.5
