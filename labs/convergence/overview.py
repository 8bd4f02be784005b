"""One picture of several grids: what is lost at how many bits, a line per case.

    python -m labs.convergence.overview --out results/NAME.json results/PAGE.json...

Every PAGE.json is the result of one grid, as the laboratory writes it. A line joins the forms of
update mode that no other form of the case beats in bits and gap at once. Peers stand beside it.
Only methods at the grid's own learning rate and with two seeds or more are shown.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_gradprune.errors import ConfigError, GradPruneError
from labs.convergence import page
from labs.convergence.plot import frontier, pyplot_of

TARGETS = ((0.03, 0.5), (0.06, 0.3), (0.1, 1.0), (0.5, 0.3))
"""What is asked for, the first two of two islands, the others of four: bits, gap in percent."""

_HIGHEST = 4.0
"""Percent. Gaps above it are outside of the picture."""


def main() -> int:
    """Run what the flags say; exit code 2 with one line for what a user can cause."""
    parser = argparse.ArgumentParser(
        prog="python -m labs.convergence.overview",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pages", type=Path, nargs="+", help="JSON results of grids")
    parser.add_argument("--out", type=Path, required=True, help="JSON; page and picture beside it")
    options = parser.parse_args()
    try:
        cases = [case_of(path) for path in options.pages]
        draw(cases, options.out.with_suffix(".png"))
    except GradPruneError as exc:
        print(exc, file=sys.stderr)
        return 2
    options.out.write_text(json.dumps({"cases": cases}, indent=1) + "\n", encoding="utf-8")
    write(cases, options.out.with_suffix(".md"), sys.argv[1:])
    return 0


def case_of(path: Path) -> dict[str, Any]:
    """What is shown of one grid.

    Returns:
        page (file name), name, workers, numel, tokens (per island and step), steps, device,
        and rows: those of `table.rows_of` that are shown, with error (standard error of the gap)
        and the method's own settings.

    Raises:
        ConfigError: it is no result of a grid.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        tokens = result["train"]["batch"] * result["model"]["context"]
        methods = {method["name"]: method for method in result["grid"]["methods"]}
        rows = [
            row
            | {"error": row["gap_std"] / row["seeds"] ** 0.5, "settings": methods[row["method"]]}
            for row in result["rows"]
            if row["kind"] != "dense" and row["seeds"] > 1 and row["stopped_at"] is None
        ]
        rows = [row for row in rows if "lr" not in row["settings"].get("train", {})]
        numel = result["numel"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{path} must be a result of a grid: {exc!r}.") from exc
    device = result.get("device", "cpu")
    where = ", CPU" if device == "cpu" else ""
    return {
        "page": path.with_suffix(".md").name,
        "name": f"{result['workers']} islands, {numel / 1e6:.2g}M, {tokens:,} tokens{where}",
        "workers": result["workers"],
        "numel": numel,
        "tokens": tokens,
        "steps": result["steps"],
        "lr": result["train"]["lr"],
        "device": device,
        "rows": rows,
    }


def ours(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The forms of update mode that no other beats, most bits first."""
    return frontier([row for row in case["rows"] if row["kind"] == "update"])


def peers(case: dict[str, Any]) -> list[dict[str, Any]]:
    """All other methods."""
    return [row for row in case["rows"] if row["kind"] != "update"]


def draw(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    pyplot = pyplot_of()
    picture, axis = pyplot.subplots(figsize=(9, 6))
    for number, case in enumerate(cases):
        colour, best = f"C{number}", ours(case)
        axis.errorbar(
            [row["bits_per_param"] for row in best],
            [row["gap_pct"] for row in best],
            yerr=[row["error"] for row in best],
            fmt="o-",
            color=colour,
            capsize=3,
            label=case["name"],
        )
        for row in peers(case):
            if row["gap_pct"] <= _HIGHEST:
                place = (row["bits_per_param"], row["gap_pct"])
                axis.errorbar(*place, yerr=row["error"], fmt="x", color=colour, capsize=3)
                axis.annotate(
                    row["method"], place, fontsize=7, xytext=(5, 4), textcoords="offset points"
                )
    for bits, gap in TARGETS:
        axis.plot([bits / 1.5, bits], [gap, gap], "k-", lw=4, alpha=0.25)
    axis.axhline(0.0, color="grey", lw=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("received bits per parameter and step, after warm-up (dense: 32, 48)")
    axis.set_ylabel("validation loss against dense, %")
    axis.set_title("dots: islands; crosses: peers; grey: what is asked for", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8)
    picture.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(picture)


def write(cases: Sequence[dict[str, Any]], path: Path, command: Sequence[str]) -> None:
    """Write the page; remarks that an earlier page has are kept."""
    words = [Path(word).name if word.startswith("/") else word for word in command]
    lines = [
        "# What is lost at how many bits?",
        "",
        f"`python -m labs.convergence.overview {shlex.join(words)}`",
        "",
        f"Commit {page.commit_of_this()}. Machines, dates and all forms stand in the page of each "
        "case. Gap: of the validation loss to dense, mean and standard error over the seeds. The "
        "forms of a case are those that no other beats in bits and gap at once.",
        "",
        f"![loss gap against bits]({path.with_suffix('.png').name})",
        "",
        "| case | method | bits | gap % | standard error | seeds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for case in cases:
        rows = [("", row) for row in ours(case)] + [("peer: ", row) for row in peers(case)]
        for mark, row in rows:
            lines.append(
                f"| [{case['name']}]({case['page']}) | {mark}{row['method']} | "
                f"{row['bits_per_param']:.3g} | {row['gap_pct']:+.2f} | {row['error']:.2f} | "
                f"{row['seeds']} |"
            )
    lines += ["", page.remarks(path)]
    path.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
