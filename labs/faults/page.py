"""The page of a call: how often each fault happened, what became of it, and how long it took."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from labs.faults.schedules import KINDS

ENDS = ("finished", "typed_error", "hung", "untyped")
HEAD = (
    "| {first} | schedules | finished | typed error | hung | untyped | diverged | lost gradient |"
)


def page(rows: Sequence[dict[str, Any]], command: str, facts: dict[str, Any]) -> str:
    """The page as Markdown. Pure.

    Args:
        rows: of the schedules.
        command: what made them.
        facts: of the machine, see `labs.machine`, with commit and date.
    """
    parts = [_head(command, facts)]
    loopback = [row for row in rows if row["part"] == "loopback"]
    if loopback:
        parts.append(_loopback(loopback))
    lost = [row for row in rows if row["part"] == "lost"]
    if lost:
        parts.append(_lost(lost))
    on_bed = [row for row in rows if row["part"] == "bed"]
    if on_bed:
        parts.append(_bed(on_bed))
    lost_on_bed = [row for row in rows if row["part"] == "bed lost"]
    if lost_on_bed:
        parts.append(_lost_on_bed(lost_on_bed))
    return "\n".join(parts)


def _head(command: str, facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        "# Faults on loopback and on the bed\n\n"
        f"- command: `{command}`\n"
        f"- commit {facts['commit']}, {facts['date']}\n"
        f"- {facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}, load average at the "
        f"end {facts['load_average'][0]:.1f}, other programs ran beside it\n"
        f"- CPython {facts['python']}, {versions}\n"
    )


def _loopback(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "## On loopback\n",
        f"{sum(row['lives'] for row in rows)} starts of {len(rows)} runs, "
        f"{min(row['ranks'] for row in rows)} to {max(row['ranks'] for row in rows)} ranks. A "
        "schedule counts in every row whose fault it has.\n",
        HEAD.format(first="fault"),
        "| --- |" + " ---: |" * 7,
        _row("all", rows),
        _row("no fault", [row for row in rows if not row["events"]]),
    ]
    for kind, meaning in KINDS.items():
        having = [row for row in rows if any(event["kind"] == kind for event in row["events"])]
        lines.append(_row(f"{kind}: {meaning}", having))
    return "\n".join(lines) + "\n"


def _lost(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "## Islands that are lost\n",
        f"{min(row['islands'] for row in rows)} to {max(row['islands'] for row in rows)} islands, "
        "a process each, over gloo on one host, with `min_islands` 1 and `timeout_s` 5. Nothing is "
        "started again. Seconds are the longest step of an island that is left, beyond its median "
        "step: median (smallest to largest).\n",
        "| lost by | schedules | finished | typed error | hung | untyped | diverged | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for deed in (*sorted({loss["deed"] for row in rows for loss in row["losses"]}), "all"):
        having = [r for r in rows if deed == "all" or deed in [x["deed"] for x in r["losses"]]]
        ends = Counter(row["end"] for row in having)
        counts = [len(having), *(ends[end] for end in ENDS)]
        counts.append(sum(bool(row["diverged"]) for row in having))
        seconds = _spread(row["recover_s"] for row in having)
        lines.append(f"| {deed} | " + " | ".join(map(str, counts)) + f" | {seconds} |")
    return "\n".join(lines) + "\n"


def _bed(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "## On the bed\n",
        "Seconds are the median (smallest to largest). Supervised: from the deed, or its end if it "
        "passes, to the next step. Bare: from the deed to the end of the last rank that lives.\n",
        "| deed | started by | schedules | finished | typed error | hung | untyped | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for supervised in (True, False):
        for deed in dict.fromkeys(row["deed"] for row in rows):
            having = [r for r in rows if (r["deed"], r["supervised"]) == (deed, supervised)]
            if not having:
                continue
            ends = Counter(row["end"] for row in having)
            key = "recover_s" if supervised else "typed_s"
            seconds = [row[key] or row["recover_s"] for row in having]
            counts = " | ".join(str(ends[end]) for end in ENDS)
            by = "launch/supervise.py" if supervised else "hand"
            lines.append(f"| {deed} | {by} | {len(having)} | {counts} | {_spread(seconds)} |")
    return "\n".join(lines) + "\n"


def _lost_on_bed(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "## Islands that are lost on the bed\n",
        "Three hosts are an island of `launch/train.py` each, `min_islands` 1 and `timeout_s` 10. "
        "Nothing is started again. A run has finished when all ranks that can be reached have made "
        "all steps, and the lost one has ended with an error if it lives. Seconds are the longest "
        "time between two steps from the deed on: median (smallest to largest).\n",
        "| deed | host | ranks | schedules | finished | typed error | hung | untyped | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def of(row: dict[str, Any]) -> tuple[int, str, int]:
        return row.get("ranks", 1), row["deed"], row["host"]

    for ranks, deed, host in sorted({of(row) for row in rows}):
        having = [row for row in rows if of(row) == (ranks, deed, host)]
        ends = Counter(row["end"] for row in having)
        counts = " | ".join(str(n) for n in (len(having), *(ends[end] for end in ENDS)))
        seconds = _spread(row["recover_s"] for row in having)
        lines.append(f"| {deed} | {host} | {ranks} | {counts} | {seconds} |")
    return "\n".join(lines) + "\n"


def _row(name: str, rows: Sequence[dict[str, Any]]) -> str:
    ends = Counter(row["end"] for row in rows)
    counts = [len(rows), *(ends[end] for end in ENDS)]
    counts += [sum(bool(row[key]) for row in rows) for key in ("diverged", "lost_gradient")]
    return f"| {name} | " + " | ".join(map(str, counts)) + " |"


def _spread(seconds: Iterable[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    if not known:
        return "-"
    return f"{statistics.median(known):.1f} ({min(known):.1f} to {max(known):.1f})"
