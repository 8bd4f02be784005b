"""`ds-gradprune report`: what a run decided and why, as text or as one HTML file."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

from ds_gradprune.commands import pictures
from ds_gradprune.commands.decided import decisions, why
from ds_gradprune.commands.doctor_page import duration, table
from ds_gradprune.commands.flags import Parser
from ds_gradprune.commands.plot import named
from ds_gradprune.commands.runlog import Entry, Run, mbit, read_run, sums
from ds_gradprune.errors import DataError

MOST_ROWS = 60
"""Decisions in a table; of more, those that changed the density least are left out."""

HEAD = (
    "step", "density", "next", "interval", "sent kB", "link Mbit/s", "compute s", "codec s",
    "wire s", "hidden s", "P(t)", "loss", "because",
)  # fmt: skip

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
       color: #1c1c1c; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; }
td { border-bottom: 1px solid #ddd; }
th { position: sticky; top: 0; background: #f4f4f4; }
td:last-child, th:last-child { text-align: left; white-space: normal; min-width: 16rem; }
.totals td:last-child, .totals th:last-child { text-align: right; min-width: 0; }
.totals td:first-child, .totals th:first-child { text-align: left; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
p.note { color: #555; }
"""


def parser() -> Parser:
    """The flags."""
    flags = Parser("report", "Tell what a run decided and why: rows at decisions, and totals.")
    flags.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, or a log")
    flags.add_argument("--html", type=Path, help="write one self-contained HTML file instead")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Raises:
        GradPruneError: a run cannot be read, or the page cannot be written.
    """
    flags = parser().parse_args(arguments)
    runs = named([read_run(path) for path in flags.runs], flags.runs)
    if flags.html is None:
        print("\n\n".join(text_of(run) for run in runs))
        return 0
    text = page(runs)
    try:
        flags.html.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise DataError(f"--html must be writable, got {flags.html}: {exc.strerror}.") from exc
    print(flags.html)
    return 0


def text_of(run: Run) -> str:
    """Rows at decisions and totals, for a terminal."""
    rows, left_out = rows_of(run)
    lines = [f"{run.name}: {totals_text(run)}", ""]
    body = (
        table(HEAD, rows, last_is_text=True)
        if run.mode != "dense"
        else ["No run without pruning decides anything."]
    )
    if left_out:
        body.append(f"{left_out} smaller decisions are left out.")
    return "\n".join([*lines, *body])


def totals_text(run: Run) -> str:
    """The sums of a run in one line."""
    total = sums(run)
    parts = [f"{total.steps} steps", f"{duration(total.seconds)} of training"]
    if total.wire_bytes:
        parts.append(
            f"{total.wire_bytes / 1e6:,.2f} MB sent instead of {total.dense_bytes / 1e6:,.2f}"
        )
    if total.last_loss is not None:
        parts.append(f"{run.loss_name} {total.last_loss:.4f} at the end")
    if run.validation:
        parts.append(f"validation loss {run.validation[-1][1]:.4f}")
    return ", ".join(parts)


def rows_of(run: Run) -> tuple[list[list[str]], int]:
    """One row per decision, and how many were left out."""
    numbers = decisions(run) if run.mode != "dense" else []
    left_out = max(0, len(numbers) - MOST_ROWS)
    if left_out:
        inner = sorted(numbers[1:-1], key=lambda number: _weight(run.entries[number]), reverse=True)
        numbers = sorted([numbers[0], *inner[: MOST_ROWS - 2], numbers[-1]])
    return [_row(run, number) for number in numbers], left_out


def _weight(entry: Entry) -> float:
    """How much a decision changed; 0.0: nothing, so that the alarm of the link alone comes last."""
    if not entry.is_move or not entry.density or not entry.next_density:
        return 0.0
    return abs(math.log(entry.next_density / entry.density))


def _row(run: Run, number: int) -> list[str]:
    entry = run.entries[number]
    return [
        str(entry.step),
        _density(entry.density),
        _density(entry.next_density) if entry.is_move else "",
        str(entry.interval),
        f"{entry.wire_bytes / 1e3:,.0f}",
        "-" if entry.link_mbit is None else mbit(entry.link_mbit),
        "-" if entry.compute_s is None else f"{entry.compute_s:.3f}",
        f"{entry.codec_s:.3f}",
        f"{entry.wire_s:.3f}",
        f"{entry.hidden_s:.3f}",
        "-" if entry.performance is None else f"{entry.performance:+.2f}",
        "-" if entry.loss is None else f"{entry.loss:.3f}",
        why(run, number),
    ]


def _density(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


# ---- HTML ----------------------------------------------------------------------------------------


def page(runs: Sequence[Run]) -> str:
    """One HTML document that needs no other file."""
    title = html.escape(", ".join(run.name for run in runs))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        _totals_table(runs),
        _picture(runs, "all runs" if len(runs) > 1 else runs[0].name),
    ]
    for run in runs:
        parts += _section(run, with_picture=len(runs) > 1)
    parts.append("</body></html>")
    return "\n".join(parts) + "\n"


def _section(run: Run, *, with_picture: bool) -> list[str]:
    parts = [f"<h2>{html.escape(run.name)}: decisions</h2>"]
    if run.mode == "dense":
        return [*parts, '<p class="note">This run prunes nothing, so it decides nothing.</p>']
    if run.mode == "update":
        parts.append(
            '<p class="note">The training loss is that of the islands\' own weights. Compare runs '
            "by their validation loss, which is that of the shared weights.</p>"
        )
    rows, left_out = rows_of(run)
    if left_out:
        parts.append(f'<p class="note">{left_out} smaller decisions are left out.</p>')
    if with_picture:
        parts.append(_picture([run], run.name))
    parts.append(_table(HEAD, rows))
    if run.config:
        text = html.escape(json.dumps(run.config, indent=2))
        parts.append(f"<details><summary>configuration</summary><pre>{text}</pre></details>")
    return parts


def _totals_table(runs: Sequence[Run]) -> str:
    head = (
        "run", "steps", "training", "computation", "codec", "wire, exposed", "wire, hidden", "sent",
        "without pruning", "training loss at the end", "validation loss",
    )  # fmt: skip
    rows = []
    for run in runs:
        total = sums(run)
        loss = "-" if total.last_loss is None else f"{total.last_loss:.4f}"
        if run.mode == "update":
            loss += " (own weights)"
        rows.append(
            [
                run.name,
                str(total.steps),
                duration(total.seconds),
                *(
                    f"{value:.1f} s ({100 * value / total.seconds:.0f} %)" if value else "-"
                    for value in (total.compute_s, total.codec_s, total.wire_s, total.hidden_s)
                ),
                f"{total.wire_bytes / 1e6:,.2f} MB" if total.dense_bytes else "-",
                f"{total.dense_bytes / 1e6:,.2f} MB" if total.dense_bytes else "-",
                loss,
                f"{run.validation[-1][1]:.4f}" if run.validation else "-",
            ]
        )
    return _table(head, rows, "totals")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _picture(runs: Sequence[Run], name: str) -> str:
    data = base64.b64encode(pictures.png(runs)).decode("ascii")
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
