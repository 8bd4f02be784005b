"""What a finished run has to show: how the density followed the link, and its result as JSON.

    python launch/report.py runs/quickstart                       a table around each change
    python launch/report.py runs/quickstart --replies FILE ...    one line, a JSON document

Reads config.json, log.jsonl and result.json of the run folder. Needs no package but the standard
library.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

AFTER_CHANGE = (-1, 0, 1, 2, 3, 5, 8, 13, 21, 34)
"""Steps shown around each change, counted from it."""

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
    """First and last step, and those around the end of the warm-up and each change of the link."""
    dense = [entry["step"] for entry in log if entry["cause"] == "warmup"]
    changes = {*(step + 1 for step in dense[-1:]), *(point["step"] for point in schedule[1:])}
    return {log[0]["step"], log[-1]["step"]} | {
        c + offset for c in changes for offset in AFTER_CHANGE
    }


def rows_of(log: Sequence[dict[str, Any]], schedule: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One row per shown step, as text."""
    shown = shown_steps(log, schedule)
    rows = []
    for entry in log:
        if entry["step"] not in shown:
            continue
        points = [point for point in schedule if point["step"] <= entry["step"]]
        density = entry["density"]
        rows.append(
            [
                str(entry["step"]),
                f"{points[-1]['rate_mbit']:g}" if points else "-",
                "dense" if density == 1.0 else f"{100 * density:.2f} %",
                f"{entry['wire_bytes'] / 1e3:.0f}",
                f"{entry['comm_time_s']:.3f}",
                "-" if entry["step_time_s"] is None else f"{entry['step_time_s']:.3f}",
                "-" if entry["performance"] is None else f"{entry['performance']:+.2f}",
                entry["cause"].replace("_", " "),
            ]
        )
    return rows


def table(log: Sequence[dict[str, Any]], schedule: Sequence[dict[str, Any]]) -> str:
    """The rows under their heads, aligned."""
    heads = ["step", "link Mbit/s", "density", "sent kB", "comm s", "step s", "P(t)", "because"]
    rows = [heads, *rows_of(log, schedule)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
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
    print(table(log, schedule_of(config)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
