"""What a finished run has to show: how the density followed the link, and its result as JSON.

    python launch/report.py runs/quickstart                       a table around each change
    python launch/report.py runs/quickstart --replies FILE ...    one line, a JSON document

Reads config.json, log.jsonl and result.json of the run folder. Needs no package but the standard
library.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULT_KEYS = (
    "steps",
    "val_loss",
    "val_loss_start",
    "wire_bytes",
    "dense_bytes",
    "density_min",
    "density_max",
)


def schedule_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The emulated link's points, in order of step; empty where nothing is emulated."""
    throttle = config.get("gradient_pruning", {}).get("throttle")
    return list(throttle["schedule"]) if throttle else []


def shown_steps(log: Sequence[dict[str, Any]], schedule: Sequence[dict[str, Any]]) -> set[int]:
    """First and last step, and those around each change of the density and of the link.

    The ramp changes the density in every step: its first and last count.
    """
    shown = {log[0]["step"], log[-1]["step"]}
    for before, entry in itertools.pairwise(log):
        in_ramp = before["cause"] == entry["cause"] == "ramp"
        if entry["density"] != before["density"] and not in_ramp:
            shown |= {before["step"], entry["step"]}
        if any(before["step"] < point["step"] <= entry["step"] for point in schedule):
            shown |= {before["step"], entry["step"]}
    return shown


def rows_of(log: Sequence[dict[str, Any]], schedule: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One row per shown step, as text."""
    shown = shown_steps(log, schedule)
    return [row_of(entry, schedule) for entry in log if entry["step"] in shown]


def row_of(entry: dict[str, Any], schedule: Sequence[dict[str, Any]]) -> list[str]:
    """One step as text."""
    points = [point for point in schedule if point["step"] <= entry["step"]]
    density, rate = entry["density"], entry["decision"].get("rate_bytes_per_s")
    return [
        str(entry["step"]),
        f"{points[-1]['rate_mbit']:g}" if points else "-",
        "-" if rate is None else f"{8e-6 * rate:.3g}",
        "dense" if density == 1.0 else f"{100 * density:.2f} %",
        f"{entry['wire_bytes'] / 1e3:.0f}",
        f"{entry['comm_time_s']:.3f}",
        "-" if entry["step_time_s"] is None else f"{entry['step_time_s']:.3f}",
        "-" if entry["performance"] is None else f"{entry['performance']:+.2f}",
        entry["cause"].replace("_", " "),
    ]


def table(log: Sequence[dict[str, Any]], schedule: Sequence[dict[str, Any]]) -> str:
    """The rows under their heads, aligned; the emulated link only where one is emulated."""
    heads = ["step", "emulated Mbit/s", "link Mbit/s", "density", "sent kB", "comm s", "step s"]
    rows = [[*heads, "P(t)", "because"], *rows_of(log, schedule)]
    if not schedule:
        rows = [[row[0], *row[2:]] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
        lines.append("  ".join([*cells, row[-1]]))
    return "\n".join(lines)


def summary(result: dict[str, Any], replies: Sequence[str]) -> str:
    """The JSON document of the run, on one line."""
    return json.dumps({key: result[key] for key in RESULT_KEYS} | {"replies": list(replies)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    flags = argparse.ArgumentParser(description="What a finished run has to show.")
    flags.add_argument("run", type=Path, help="run folder of launch/train.py")
    flags.add_argument("--replies", type=Path, nargs="+", help="files that hold a reply each")
    given = flags.parse_args(arguments)
    try:
        if given.replies:
            result = json.loads((given.run / "result.json").read_text(encoding="utf-8"))
            texts = [path.read_text(encoding="utf-8").strip() for path in given.replies]
            print(summary(result, texts))
            return 0
        config = json.loads((given.run / "config.json").read_text(encoding="utf-8"))
        lines = (given.run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as exc:
        print(
            f"error: {given.run} must be a finished run of launch/train.py: {exc}.", file=sys.stderr
        )
        return 2
    log = [json.loads(line) for line in lines]
    if not log or "density" not in log[0]:
        print("Gradient pruning was idle: there is no density to show.")
        return 0
    try:
        print(table(log, schedule_of(config)), flush=True)
    except BrokenPipeError:  # the reader of our stdout has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
