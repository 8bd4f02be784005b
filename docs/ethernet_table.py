"""The README's tables of methods on shaped links, made from the newest results.

python docs/ethernet_table.py            prints the tables
python docs/ethernet_table.py --write    puts them between the markers in README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # The root instead of this folder, whose files are scripts and no modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from docs.readme_table import ROOT, ReadmeTable, markdown

RESULTS = (
    ("Two hosts", "ethernet_cpu_202611_2hosts"),
    ("Two hosts, with the default budget of today", "ethernet_cpu_202611_2hosts_budget"),
    ("Four hosts, 32 steps", "ethernet_cpu_202611_4hosts"),
)
"""Title, and page in results/."""

ALIKE = 1.05
"""Bytes of a method differ by so much from rate to rate through acknowledgements alone."""


def make() -> str:
    """Markdown, a table for each page."""
    parts = [f"{title} ([page](results/{name}.md)):\n\n{_table(name)}" for title, name in RESULTS]
    return "\n\n".join(parts)


def _table(name: str) -> str:
    """One row per method, in the order of the results."""
    path = ROOT / "results" / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    rates = sorted({row["rate_mbit"] for row in rows if row["rate_mbit"] is not None})
    cells = {(row["method"], row["rate_mbit"]): row for row in rows}
    head = ["method", "kB / step"]
    head += [f"s / step at {rate:g} Mbit/s" for rate in rates]
    head += ["val. loss", *(f"s to dense's loss at {rate:g}" for rate in rates)]
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [cells[method, rate] for rate in rates]
        label = f"{method} (simulated)" if own[0]["is_simulated"] else method
        table.append(
            [
                label,
                _span([row["wire_bytes"] / 1e3 for row in own], ",.0f", ALIKE),
                *(f"{row['step_time_s']:.2f}" for row in own),
                _span([row["val_loss"] for row in own], ".3f"),
                *(_time(row["time_to_dense_loss_s"]) for row in own),
            ]
        )
    return markdown(head, table)


def _span(values: list[float], form: str, alike: float = 1.0) -> str:
    """The middle one if all are alike, within this factor; else the least and the most."""
    values = sorted(values)
    if values[-1] <= alike * values[0]:
        return format(values[len(values) // 2], form)
    return f"{values[0]:{form}} to {values[-1]:{form}}"


def _time(seconds: Any) -> str:
    return "never" if seconds is None else f"{seconds:.0f}"


TABLE = ReadmeTable("ethernet figures", "docs/ethernet_table.py", make)

if __name__ == "__main__":
    TABLE.main(sys.argv[1:])
