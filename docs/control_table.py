"""The table of control laws in docs/control.md, made from the newest results.

python docs/control_table.py            prints the table
python docs/control_table.py --write    puts it between the markers in docs/control.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    # The root instead of this folder, whose files are scripts and no modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from docs.marked_table import ROOT, MarkedTable, markdown, run

RESULTS = ROOT / "results" / "control_cpu_202611.json"

COLUMNS = (
    ("settle_down_p95", "settle down", ".0f"),
    ("settle_up_p95", "up", ".0f"),
    ("late_down_p95", "late", ".0f"),
    ("in_budget", "in budget", ".1%"),
    ("density_vs_oracle", "density / oracle", ".2f"),
    ("stationary_changes", "stationary changes", ".0f"),
    ("false_miss", "false P missed", ".2%"),
)
"""Key in the results, title, format."""


def table() -> str:
    """Markdown, one row per law, in the order of the results."""
    laws = json.loads(RESULTS.read_text(encoding="utf-8"))["laws"]
    rows = []
    for name, figures in laws.items():
        cells = [
            "-" if figures[key] is None else format(figures[key], form) for key, _, form in COLUMNS
        ]
        rows.append([f"`{name}`", *cells])
    return markdown(["law", *(head for _, head, _ in COLUMNS)], rows)


TABLES = (MarkedTable("docs/control.md", "control figures", "docs/control_table.py", table),)

if __name__ == "__main__":
    run(TABLES, sys.argv[1:])
