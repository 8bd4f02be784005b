"""Tables: for the screen and for the results page."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labs.machine import commit
from labs.race.figures import Row
from labs.race.methods import parse_method

HEADER = (
    "method",
    "link",
    "step s",
    "IQR",
    "compute",
    "codec",
    "exposed comm",
    "hidden",
    "kB/step at the NIC",
    "kB/step, own count",
    "val. loss",
    "spread",
    "s to dense's loss",
    "tokens/s",
    "of unshaped",
)

NOTE = (
    "Medians over rounds. Hidden: share of the time that the counted bytes need on the link, which "
    "no step waited for. Of unshaped: tokens/s over those of the same method on an unshaped link. "
    "A link rate with *: step times measured at that rate, combined with the losses of the "
    "unshaped run of the same round. Steps before a compression begins count in the time to "
    "dense's loss only. Simulated: not the method's own code, which no CPU runs, but its update "
    "and its bytes on the same links. Where not every step has an exchange, times and bytes are "
    "means over those with and without. Never: not within the steps trained."
)


def cells(row: Row) -> list[str]:
    """A row of the table."""
    rate = "unshaped" if row.rate_mbit is None else f"{row.rate_mbit:g} Mbit/s"
    return [
        parse_method(row.method).label,
        rate + ("*" if row.is_combined else ""),
        f"{row.step_time_s:.3f}",
        f"{row.step_time_iqr_s:.3f}",
        f"{row.compute_s:.3f}",
        f"{row.codec_s:.3f}",
        f"{row.exposed_comm_s:.3f}",
        _number(row.hidden_fraction, 0.01, ".0f")
        + (" %" if row.hidden_fraction is not None else ""),
        _number(row.wire_bytes, 1e3, ".1f"),
        _number(row.payload_bytes, 1e3, ".1f"),
        _number(row.val_loss, 1.0, ".4f"),
        _number(row.val_loss_spread, 1.0, ".4f"),
        "never" if row.time_to_dense_loss_s is None else f"{row.time_to_dense_loss_s:.1f}",
        f"{row.tokens_per_s:.0f}",
        _number(row.throughput_vs_unshaped, 1.0, ".2f"),
    ]


def text_table(rows: Sequence[Row]) -> str:
    """For the screen."""
    table = [list(HEADER), *(cells(row) for row in by_rate(rows))]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    )


def markdown_table(rows: Sequence[Row]) -> str:
    """For the page."""
    lines = [list(HEADER), ["---", "---", *["---:"] * (len(HEADER) - 2)]]
    lines += [cells(row) for row in by_rate(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_rate(rows: Sequence[Row]) -> list[Row]:
    """Slowest link first, unshaped last, methods in their order within."""
    return sorted(rows, key=lambda row: float("inf") if row.rate_mbit is None else row.rate_mbit)


def break_even_lines(
    method: str | None, mbit: float | None, checks: Sequence[dict[str, Any]]
) -> list[str]:
    """Prediction and check as sentences."""
    if method is None:
        return ["Break-even: not computed; it needs dense_fp32, a topk method, and counted bytes."]
    if mbit is None:
        lines = [f"Break-even of {method}: the model sees no link rate where the winner changes."]
    else:
        lines = [f"Break-even, predicted: {method} beats dense_fp32 below {mbit:.0f} Mbit/s."]
    for one in checks:
        predicted, measured = one["speedup_predicted"], one["speedup_measured"]
        agree = "as predicted" if (predicted > 1) == (measured > 1) else "NOT as predicted"
        lines.append(
            f"At {one['rate_mbit']:g} Mbit/s: dense {one['dense_predicted_s']:.3f} s predicted, "
            f"{one['dense_measured_s']:.3f} s measured; {method} {one['pruned_predicted_s']:.3f} s "
            f"and {one['pruned_measured_s']:.3f} s; {predicted:.2f} times as fast predicted, "
            f"{measured:.2f} measured: {'wins' if measured > 1 else 'loses'} {agree}."
        )
    return lines


def setting(root: Path, at_start: dict[str, Any]) -> dict[str, Any]:
    """What every results file says of its run: command, commit, date and machine.

    Args:
        root: of the project.
        at_start: `machine()`, taken before the run.
    """
    return {
        # What a path is called here is nobody's business elsewhere.
        "command": " ".join(Path(w).name if w.startswith("/") else w for w in sys.argv),
        "commit": commit(root),
        "date": time.strftime("%Y-%m-%d"),
        "machine": at_start,
    }


def _number(value: float | None, unit: float, form: str) -> str:
    return "-" if value is None else format(value / unit, form)
