"""The tables of methods on shaped links, made from the newest results.

python docs/ethernet_table.py            prints the tables
python docs/ethernet_table.py --write    puts them into README.md and docs/measured.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # The root instead of this folder, whose files are scripts and no modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from docs.marked_table import ROOT, MarkedTable, markdown, run

RACE = "ethernet_cpu_202611_2hosts_micro_rounds"
"""The page behind the README's result table."""

NEWEST = "ethernet_cpu_202611_2hosts_budget"
"""The newest page with a pinned density beside the law's."""

PAGES = (
    ("Two hosts", "ethernet_cpu_202611_2hosts"),
    ("Two hosts, with the default budget of today", NEWEST),
    ("Four hosts, 32 steps", "ethernet_cpu_202611_4hosts"),
)
"""Title, and page in results/."""

PAYS = (
    (2, "10.1M, a CPU core per host", NEWEST),
    (4, "10.1M, half a CPU core per host", "ethernet_cpu_202611_4hosts"),
)
"""Hosts, model and device, and page in results/."""

DENSE, PINNED, ADAPTIVE = "dense_fp32", "islands_0.05", "ours_update"
"""Methods: DeepSpeed alone, islands at a density of 5 %, islands that choose their density."""

RESULT_METHODS = {
    DENSE: "DeepSpeed alone, fp32",
    "bf16_hook": "torch's DDP with its bf16 hook",
    "powersgd_4": "PowerSGD rank 4 in DDP",
    "ours_update_hidden": "islands, their exchange hidden",
}
"""Rows of the README's result table."""

GPU = "gpu_check_202611"
"""Page of a GPU, of which no loss was compared and no slow link tried."""

PAYS_SHARE = 0.8
"""Pruning is called worth its trouble below this share of dense DeepSpeed's time."""

ALIKE = 1.05
"""Bytes of a method differ by so much from rate to rate through acknowledgements alone."""

Cells = Mapping[tuple[str, float | None], Mapping[str, Any]]
"""Method and rate in Mbit/s (None: unshaped) to its row of the results."""


def load(name: str) -> Cells:
    """The rows of one page, in the order of the results."""
    path = ROOT / "results" / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {(row["method"], row["rate_mbit"]): row for row in rows}


def rates_of(cells: Cells) -> list[float]:
    """The shaped rates of a page, Mbit/s, rising."""
    return sorted({rate for _, rate in cells if rate is not None})


def pays() -> str:
    """Markdown: time to dense DeepSpeed's loss as a share of dense DeepSpeed's, link by link."""
    rows = []
    for hosts, machine, name in PAYS:
        cells = load(name)
        for rate in [*rates_of(cells), None]:
            dense_s = cells[DENSE, rate]["time_to_dense_loss_s"]
            pinned, adaptive = (
                None if (took := cells[method, rate]["time_to_dense_loss_s"]) is None
                else took / dense_s
                for method in (PINNED, ADAPTIVE)
            )  # fmt: skip
            link = "unshaped" if rate is None else f"{rate:g} Mbit/s"
            use = verdict(pinned, adaptive)
            rows.append([link, str(hosts), machine, use, share(pinned), share(adaptive)])
    rows.append(on_a_gpu())
    head = ["link", "hosts", "model, device", "use it", "5 % pinned", "density by the law"]
    return markdown(head, rows, num_text=4)


def on_a_gpu() -> list[str]:
    """The row of the one GPU that was tried: a step's share of a dense step, and no loss."""
    path = ROOT / "results" / f"{GPU}.json"
    cases = json.loads(path.read_text(encoding="utf-8"))["runs"][-1]["parts"]["profile"]["cases"]
    pruned_s, dense_s = (
        cases[name]["learn_s"] + cases[name]["step_s"] for name in ("ZeRO-0 pruned", "ZeRO-0 dense")
    )
    step = f"[{pruned_s / dense_s:.2f} of a step](results/{GPU}.md)"
    return ["loopback", "1", "124M, two ranks on one H200", "unknown", step, "not measured"]


def verdict(pinned: float | None, adaptive: float | None) -> str:
    """Whether pruning pays, from its two shares of dense DeepSpeed's time; None: never there."""
    if adaptive is not None and adaptive <= PAYS_SHARE:
        return "yes"
    if pinned is not None and pinned <= PAYS_SHARE:
        return "yes, pin the density"
    return "no"


def share(value: float | None) -> str:
    """A share of dense DeepSpeed's time as text."""
    return "never" if value is None else f"{value:.2f}"


def result() -> str:
    """Markdown: the README's one result table."""
    cells = load(RACE)
    rates = [*rates_of(cells), None]
    head = ["two hosts", "validation loss"]
    head += [f"MB per step at {rates[0]:g} Mbit/s"]
    head += [f"s to dense's loss at {rate:g}" for rate in rates[:-1]] + ["unshaped"]
    rows = []
    for method, label in RESULT_METHODS.items():
        own = [cells[method, rate] for rate in rates]
        rows.append(
            [
                label,
                span([row["val_loss"] for row in own], ".3f"),
                f"{own[0]['wire_bytes'] / 1e6:.2f}",
                *(seconds(row["time_to_dense_loss_s"]) for row in own),
            ]
        )
    return markdown(head, rows)


def everything() -> str:
    """Markdown: every method of every page."""
    parts = [f"{title} ([page](../results/{name}.md)):\n\n{methods(name)}" for title, name in PAGES]
    return "\n\n".join(parts)


def methods(name: str) -> str:
    """Markdown: one row per method of a page, in the order of the results."""
    cells = load(name)
    rates = rates_of(cells)
    head = ["method", "kB / step"]
    head += [f"s / step at {rate:g} Mbit/s" for rate in rates]
    head += ["val. loss", *(f"s to dense's loss at {rate:g}" for rate in rates)]
    rows = []
    for method in dict.fromkeys(method for method, _ in cells):
        own = [cells[method, rate] for rate in rates]
        label = f"{method} (simulated)" if own[0]["is_simulated"] else method
        rows.append(
            [
                label,
                span([row["wire_bytes"] / 1e3 for row in own], ",.0f", ALIKE),
                *(f"{row['step_time_s']:.2f}" for row in own),
                span([row["val_loss"] for row in own], ".3f"),
                *(seconds(row["time_to_dense_loss_s"]) for row in own),
            ]
        )
    return markdown(head, rows)


def span(values: list[float], form: str, alike: float = 1.0) -> str:
    """The middle value if all lie within this factor, else the least and the most."""
    values = sorted(values)
    if values[-1] <= alike * values[0]:
        return format(values[len(values) // 2], form)
    return f"{values[0]:{form}} to {values[-1]:{form}}"


def seconds(value: float | None) -> str:
    """A time as text."""
    return "never" if value is None else f"{value:.0f}"


_SCRIPT = "docs/ethernet_table.py"
TABLES = (
    MarkedTable("README.md", "when it pays", _SCRIPT, pays),
    MarkedTable("README.md", "result", _SCRIPT, result),
    MarkedTable("docs/measured.md", "ethernet figures", _SCRIPT, everything),
)

if __name__ == "__main__":
    run(TABLES, sys.argv[1:])
