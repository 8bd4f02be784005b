"""The frontier: loss gap against received bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_gradprune.errors import MissingDependencyError

_MARKERS = "osD^v<>Px*"


def frontier(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that no other beats in bits and gap at once, most bits first."""
    best: list[dict[str, Any]] = []
    for row in sorted(_ended(rows), key=lambda r: (r["bits_per_param"], r["gap_pct"])):
        if not best or row["gap_pct"] < best[-1]["gap_pct"]:
            best.append(row)
    return best[::-1]


def _ended(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of methods that ran to their end, without dense: the points."""
    return [row for row in rows if row["kind"] != "dense" and row["stopped_at"] is None]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    pyplot = pyplot_of()
    picture, axis = pyplot.subplots(figsize=(9, 6))
    points = _ended(rows)
    kinds = list(dict.fromkeys(row["kind"] for row in points))
    for kind, marker in zip(kinds, itertools.cycle(_MARKERS), strict=False):
        own = [row for row in points if row["kind"] == kind]
        axis.errorbar(
            [row["bits_per_param"] for row in own],
            [row["gap_pct"] for row in own],
            yerr=[row["gap_std"] or 0.0 for row in own],
            fmt=marker,
            capsize=3,
            label=kind,
        )
    best = frontier(rows)
    _name_points(axis, points, best)
    axis.plot([r["bits_per_param"] for r in best], [r["gap_pct"] for r in best], "k-", lw=0.8)
    axis.margins(x=0.2)
    axis.axhline(0.0, color="grey", lw=0.8)
    if points:  # dense alone is none of them
        axis.set_xscale("log")
    axis.set_xlabel("received bits per parameter and step, after warm-up")
    axis.set_ylabel("validation loss against dense, %")
    axis.grid(alpha=0.3)
    if kinds:
        axis.legend()
    picture.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(picture)


def _name_points(
    axis: Any, points: Sequence[dict[str, Any]], best: Sequence[dict[str, Any]]
) -> None:
    for row in points:
        axis.annotate(
            row["method"],
            (row["bits_per_param"], row["gap_pct"]),
            fontsize=7,
            color="k" if row in best else "grey",
            xytext=(4, 4 if row in best else -10),
            textcoords="offset points",
        )


def pyplot_of() -> Any:
    """matplotlib's, without a screen; raises MissingDependencyError."""
    try:
        import matplotlib
    except ImportError as exc:
        raise MissingDependencyError(
            "The picture needs matplotlib: pip install matplotlib; or give --no-plot."
        ) from exc
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
