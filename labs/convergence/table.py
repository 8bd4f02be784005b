"""Rows of the result: one per method, over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

AVERAGED = "val_loss_averaged"
"""Key that runs from before it was measured lack, and that unfinished ones hold as None."""


def rows_of(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method, in order of first appearance.

    Args:
        runs: records with method, kind, train (its hyper-parameters), seed and the figures of
            `trial.run_trial`; every method's hyper-parameters have a dense run of each seed.

    Returns:
        method, bits_per_param, val_loss, gap_pct (against dense at the same hyper-parameters, mean
        over seeds of the paired gaps), gap_std (of those gaps; None with one seed), gap_error
        (standard error of their mean; None with one seed), seeds,
        gap_best_pct (against the best dense), gap_flushed_pct (after a last exact exchange),
        gap_averaged_pct (weights averaged over the end of the run, against dense's averaged so too;
        None where a run was made before that was measured),
        first_lab (some run is of the first laboratory, see `store.keys_of`), stopped_at,
        link_s (seconds on a simulated link, see `steered`; None where there was none).
    """
    dense = {(_settings(run), run["seed"]): run for run in runs if run["kind"] == "dense"}
    by_settings: dict[str, list[float]] = {}
    for (settings, _), run in dense.items():
        by_settings.setdefault(settings, []).append(run["val_loss"])
    best = min(statistics.fmean(losses) for losses in by_settings.values())
    return [
        _row(name, [run for run in runs if run["method"] == name], dense, best)
        for name in dict.fromkeys(run["method"] for run in runs)
    ]


def _row(
    name: str,
    own: list[dict[str, Any]],
    dense: dict[tuple[str, Any], dict[str, Any]],
    best: float,
) -> dict[str, Any]:
    """The row of one method."""
    pairs = [(run, dense[_settings(run), run["seed"]]) for run in own]
    gaps = [_gap_pct(run["val_loss"], base["val_loss"]) for run, base in pairs]
    spread = statistics.stdev(gaps) if len(gaps) > 1 else None
    loss = statistics.fmean(run["val_loss"] for run in own)
    stops = [run["stopped_at"] for run in own if run["stopped_at"] is not None]
    return {
        "method": name,
        "kind": own[0]["kind"],
        "bits_per_param": statistics.fmean(run["bits_per_param"] for run in own),
        "val_loss": loss,
        "gap_pct": statistics.fmean(gaps),
        "gap_std": spread,
        "gap_error": None if spread is None else spread / len(gaps) ** 0.5,
        "seeds": len(own),
        "gap_best_pct": _gap_pct(loss, best),
        "gap_flushed_pct": statistics.fmean(
            _gap_pct(run["val_loss_flushed"], base["val_loss"]) for run, base in pairs
        ),
        "gap_averaged_pct": _averaged_pct(pairs),
        "first_lab": any(run.get("first_lab", False) for run in own),
        "stopped_at": min(stops, default=None),
        "link_s": _link_s(own),
    }


def _link_s(runs: Sequence[dict[str, Any]]) -> float | None:
    """Seconds of a run on the simulated link, mean; None where there was none."""
    times_s = [run.get("notes", {}).get("link_s") for run in runs]
    return None if None in times_s else statistics.fmean(times_s)


def _averaged_pct(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> float | None:
    """The gap of averaged weights; None where a run was made before it was measured."""
    averages = [(run.get(AVERAGED), base.get(AVERAGED)) for run, base in pairs]
    if any(None in pair for pair in averages):
        return None
    return statistics.fmean(_gap_pct(*pair) for pair in averages)


def _gap_pct(loss: float, base: float) -> float:
    return 100 * (loss / base - 1)


def _settings(run: dict[str, Any]) -> str:
    """What a run shares with its dense run: all hyper-parameters but the length of warm-up."""
    return str(sorted(item for item in run["train"].items() if item[0] != "warmup_steps"))


HEADER = (
    "method",
    "bits",
    "val. loss",
    "gap %",
    "spread",
    "standard error",
    "gap to best dense %",
    "gap after last exchange %",
    "gap of averaged weights %",
    "seeds",
)


def cells(row: dict[str, Any]) -> list[str]:
    """A row for people."""
    spread, error = (
        "" if row[key] is None else f"{row[key]:.2f}" for key in ("gap_std", "gap_error")
    )
    seeds = f"{row['seeds']}"
    if row["stopped_at"] is not None:
        seeds += f", ended at step {row['stopped_at']}"
    return [
        row["method"],
        f"{row['bits_per_param']:.3g}" + ("*" if row["first_lab"] else ""),
        f"{row['val_loss']:.4f}",
        f"{row['gap_pct']:+.2f}",
        spread,
        error,
        f"{row['gap_best_pct']:+.2f}",
        f"{row['gap_flushed_pct']:+.2f}",
        "" if row["gap_averaged_pct"] is None else f"{row['gap_averaged_pct']:+.2f}",
        seeds,
    ]


def comparable(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs whose dense run is among them."""
    dense = {(_settings(run), run["seed"]) for run in runs if run["kind"] == "dense"}
    return [run for run in runs if (_settings(run), run["seed"]) in dense]


def by_bits(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Dense first, then fewest bits last."""
    return sorted(rows, key=lambda row: (row["kind"] != "dense", -row["bits_per_param"]))


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """For the page."""
    lines = [list(HEADER), ["---", *["---:"] * (len(HEADER) - 1)]]
    lines += [cells(row) for row in by_bits(rows)]
    if any(row.get("link_s") is not None for row in rows):
        times_s = [row.get("link_s") for row in by_bits(rows)]
        last = ["s on the link", "---:", *("" if s is None else f"{s:.0f}" for s in times_s)]
        lines = [[*line, cell] for line, cell in zip(lines, last, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
