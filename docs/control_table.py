"""The README's table of control laws, made from the newest results.

python docs/control_table.py            prints the table
python docs/control_table.py --write    puts it between the markers in README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "results" / "control_cpu_202611.json"
BEGIN = "<!-- control figures: written by docs/control_table.py -->"
END = "<!-- end of control figures -->"

COLUMNS = (
    ("settle_down_p95", "settle down", ".0f"),
    ("settle_up_p95", "up", ".0f"),
    ("late_down_p95", "late", ".0f"),
    ("in_budget", "in budget", ".1%"),
    ("density_vs_oracle", "density / oracle", ".2f"),
    ("stationary_changes", "stationary changes", ".0f"),
    ("false_miss", "false P missed", ".2%"),
)


def table() -> str:
    """Markdown, one row per law, in the order of the results."""
    laws = json.loads(RESULTS.read_text(encoding="utf-8"))["laws"]
    rows = [
        f"| law | {' | '.join(head for _, head, _ in COLUMNS)} |",
        f"|---|{'---:|' * len(COLUMNS)}",
    ]
    for name, figures in laws.items():
        cells = [
            "-" if figures[key] is None else format(figures[key], form) for key, _, form in COLUMNS
        ]
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def readme_with_table(readme: str) -> str:
    """The README's text with a fresh table between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md must hold the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    """Print or write."""
    if "--write" in sys.argv[1:]:
        README.write_text(readme_with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
