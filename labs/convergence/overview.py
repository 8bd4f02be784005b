"""One picture of several grids: what is lost at how many bits, a line per case.

    python -m labs.convergence.overview --out results/NAME.json results/PAGE.json...

Every PAGE.json is the result of one grid, or of `labs.tuned`. Pages of one number of islands, size
and tokens are one case. A line joins what the product does by default: its recipes. Beside it stand
the other forms of update mode that none beats in bits and gap at once, and the peers. Only methods
at the grid's own learning rate and with two seeds or more are shown.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_gradprune.errors import ConfigError, GradPruneError
from labs.convergence import page
from labs.convergence.overview_plot import draw
from labs.convergence.recipes import defaults, others, peers
from labs.tuned.jobs import ISLANDS, METHODS

_PARTS = {"full": "fine-tuned", "lora": "of LoRA fine-tuned"}


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
        cases = merged([case_of(path) for path in options.pages])
        draw(cases, options.out.with_suffix(".png"))
    except GradPruneError as exc:
        print(exc, file=sys.stderr)
        return 2
    options.out.write_text(json.dumps({"cases": cases}, indent=1) + "\n", encoding="utf-8")
    write(cases, options.out.with_suffix(".md"), sys.argv[1:])
    return 0


def case_of(path: Path) -> dict[str, Any]:
    """What is shown of one page.

    Returns:
        name, workers, numel, tokens (per island and step), steps, and rows: those of
        `table.rows_of` that are shown, with error (standard error of the gap), page (file name)
        and the method's own settings.

    Raises:
        ConfigError: it is no result of a grid and none of `labs.tuned`.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        case = _tuned(result) if "tuned" in result else _of_grid(result)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{path} must be a result of a grid: {exc!r}.") from exc
    for row in case["rows"]:
        row["page"] = path.with_suffix(".md").name
    return case


def _of_grid(result: dict[str, Any]) -> dict[str, Any]:
    """A grid of the laboratory, from nothing."""
    methods = {method["name"]: method for method in result["grid"]["methods"]}
    rows = [
        row | {"error": row["gap_std"] / row["seeds"] ** 0.5, "settings": methods[row["method"]]}
        for row in result["rows"]
        if row["kind"] != "dense" and row["seeds"] > 1 and row["stopped_at"] is None
    ]
    tokens = result["train"]["batch"] * result["model"]["context"]
    numel, workers = result["numel"], result["workers"]
    return {
        "name": f"{workers} islands, {numel / 1e6:.3g}M, {tokens:,} tokens",
        "workers": workers,
        "numel": numel,
        "tokens": tokens,
        "steps": result["steps"],
        "tuned": False,
        "adapters": False,
        "rows": [row for row in rows if "lr" not in row["settings"].get("train", {})],
    }


def _tuned(result: dict[str, Any]) -> dict[str, Any]:
    """Fine-tuning by `labs.tuned`, of all weights if there is such a run, paired by seed."""
    kind = "full" if any(run["kind"] == "full" for run in result["tuned"]) else "lora"
    runs = [run for run in result["tuned"] if run["kind"] == kind]
    dense = {run["seed"]: run for run in runs if run["method"] == "dense"}
    rows = []
    for name in dict.fromkeys(run["method"] for run in runs if run["method"] != "dense"):
        own = [run for run in runs if run["method"] == name and run["seed"] in dense]
        gaps = [100 * (run["val_loss"] / dense[run["seed"]]["val_loss"] - 1) for run in own]
        rows.append(
            {
                "method": name,
                "kind": "update",
                "bits_per_param": statistics.fmean(run["bits_per_param"] for run in own),
                "gap_pct": statistics.fmean(gaps),
                "error": statistics.stdev(gaps) / len(gaps) ** 0.5,
                "seeds": len(gaps),
                "stopped_at": None,
                "settings": METHODS[name].settings(),
            }
        )
    first = runs[0]
    numel, tokens = first["trained"], first["tokens"]
    return {
        "name": f"{ISLANDS} islands, {numel / 1e6:.3g}M {_PARTS[kind]}, {tokens:,} tokens",
        "workers": ISLANDS,
        "numel": numel,
        "tokens": tokens,
        "steps": first["steps"],
        "tuned": True,
        "adapters": kind == "lora",
        "rows": rows,
    }


def merged(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cases of one name as one, with the rows of the first page that has such a method first."""
    by_name: dict[str, dict[str, Any]] = {}
    for case in cases:
        if case["name"] in by_name:
            known = by_name[case["name"]]
            by_name[case["name"]] = known | {"rows": [*known["rows"], *case["rows"]]}
        else:
            by_name[case["name"]] = case
    return list(by_name.values())


def write(cases: Sequence[dict[str, Any]], path: Path, command: Sequence[str]) -> None:
    """Write the page; remarks that an earlier page has are kept."""
    words = [Path(word).name if word.startswith("/") else word for word in command]
    lines = [
        "# What is lost at how many bits?",
        "",
        f"`python -m labs.convergence.overview {shlex.join(words)}`",
        "",
        f"Commit {page.commit_of_this()}. Machines, dates and all forms stand in the page of each "
        "row. Gap: of the validation loss to dense, mean and standard error over the seeds. "
        "Default: what the product does in every step at 1 %, and in rounds of 5 and 10 at 3.1 % "
        "and 2 bits. Other: forms that none of the case beats in bits and gap at once.",
        "",
        f"![loss gap against bits]({path.with_suffix('.png').name})",
        "",
        "| case | method | bits | gap % | standard error | seeds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for case in cases:
        rows = [("default: ", row) for row in defaults(case)]
        rows += [("other: ", row) for row in others(case)]
        rows += [("peer: ", row) for row in peers(case)]
        for mark, row in rows:
            name = row.get("recipe", row["method"])
            lines.append(
                f"| [{case['name']}]({row['page']}) | {mark}{name} | "
                f"{row['bits_per_param']:.3g} | {row['gap_pct']:+.2f} | {row['error']:.2f} | "
                f"{row['seeds']} |"
            )
    lines += ["", page.remarks(path)]
    path.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
