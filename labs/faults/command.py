"""The command: plays the schedules, and tells them in one JSON document."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import logging
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from labs.faults import bed, bed_lost, bed_schedule, loopback, lost, schedules
from labs.faults.bed_schedule import LASTING
from labs.faults.page import ENDS, page
from labs.machine import commit, machine

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None, description: str | None = None) -> int:
    """Run the script; returns its exit code: 0 if nothing hung, diverged, was lost or untyped."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--loopback", type=int, default=0, help="schedules on loopback (default: 0)")
    flags.add_argument("--lost", type=int, default=0, help="schedules of lost islands (default: 0)")
    flags.add_argument("--bed", type=int, default=0, help="schedules on the bed (default: 0)")
    flags.add_argument(
        "--bed-lost", type=int, default=0, help="schedules of lost islands there (default: 0)"
    )
    flags.add_argument(
        "--ranks", type=int, default=1, help="on each host with --bed-lost (default: 1)"
    )
    flags.add_argument("--first", type=int, default=0, help="number of the first (default: 0)")
    flags.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    flags.add_argument(
        "--out", type=Path, help="JSON file of every schedule, with a page beside it"
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = flags.parse_args(words)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    numbers = range(given.first, given.first + given.loopback)
    rows = [_on_loopback(given.seed, number) for number in numbers]
    rows += [_of_lost(given.seed, n) for n in range(given.first, given.first + given.lost)]
    rows += _on_bed("bed", given.seed, range(given.first, given.first + given.bed))
    numbers = range(given.first, given.first + given.bed_lost)
    rows += _on_bed("bed lost", given.seed, numbers, given.ranks)
    summary = summarize(rows)
    if given.out is not None:
        facts = machine() | {"commit": commit(ROOT), "date": str(datetime.date.today())}
        document = {"facts": facts, "summary": summary, "schedules": rows}
        given.out.write_text(json.dumps(document, indent=1) + "\n")
        command = shlex.join(["python", "benchmarks/faults.py", *words])
        given.out.with_suffix(".md").write_text(page(rows, command, facts))
    print(json.dumps(summary))
    return int(any(summary[key] for key in ("hung", "untyped", "diverged", "lost_gradient")))


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The document of the last line."""
    ends = Counter(row["end"] for row in rows)
    lasting = [row for row in rows if row.get("supervised") and row["deed"] in LASTING]
    recover_s = sorted(row["recover_s"] for row in lasting if row["recover_s"] is not None)
    without_s = sorted(
        row["recover_s"]
        for row in rows
        if row.get("part") in ("lost", "bed lost") and row["recover_s"] is not None
    )
    typed_s = sorted(row["typed_s"] for row in rows if row.get("typed_s") is not None)
    return {
        "schedules": len(rows),
        **{end: ends[end] for end in ENDS},
        "diverged": sum(bool(row.get("diverged")) for row in rows),
        "lost_gradient": sum(bool(row.get("lost_gradient")) for row in rows),
        "recover_s_p95": _p95(recover_s),
        "without_restart_s_p95": _p95(without_s),
        "typed_s_p95": _p95(typed_s),
    }


def _p95(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return values[0] if values else None
    return round(statistics.quantiles(values, n=20, method="inclusive")[-1], 2)


def _on_loopback(seed: int, number: int) -> dict[str, Any]:
    schedule = schedules.draw(seed, number)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        verdict = loopback.play(schedule, Path(folder) / "checkpoints")
    row = {"part": "loopback", "number": number} | dataclasses.asdict(verdict)
    row |= {"seconds": round(time.monotonic() - began_s, 2), "ranks": schedule.ranks}
    row |= {"config": schedule.config.model_dump(mode="json", exclude_defaults=True)}
    row |= {"events": [dataclasses.asdict(event) for event in schedule.events]}
    _say(row)
    return row


def _of_lost(seed: int, number: int) -> dict[str, Any]:
    schedule = lost.draw(seed, number)
    row = {"part": "lost", "number": number} | dataclasses.asdict(lost.play(schedule))
    row |= {"islands": schedule.islands, "steps": schedule.steps}
    row |= {"config": schedule.config.model_dump(mode="json", exclude_defaults=True)}
    row |= {"losses": [dataclasses.asdict(loss) for loss in schedule.losses]}
    _say(row)
    return row


def _on_bed(part: str, seed: int, numbers: range, ranks: int = 1) -> list[dict[str, Any]]:
    rows, has_lost = list[dict[str, Any]](), part == "bed lost"
    play = bed_lost.play if has_lost else bed.play
    with tempfile.TemporaryDirectory() as inputs:
        if numbers:
            bed_schedule.write_inputs(Path(inputs))
        for number in numbers:
            schedule = (
                bed_lost.draw(seed, number, ranks) if has_lost else bed_schedule.draw(seed, number)
            )
            with tempfile.TemporaryDirectory() as folder:
                verdict = play(schedule, Path(inputs), Path(folder))
            row = {"part": part, "number": number} | dataclasses.asdict(schedule)
            rows.append(row | dataclasses.asdict(verdict))
            _say(rows[-1])
    return rows


def _say(row: dict[str, Any]) -> None:
    """One line for people; all that is known where it is no good end."""
    bad = row["end"] in ("hung", "untyped") or row.get("diverged") or row.get("lost_gradient")
    shown = row if bad else {k: row[k] for k in ("part", "number", "end")}
    if row["part"].startswith("bed"):
        shown |= {
            k: row[k] for k in ("deed", "host", "hosts", "supervised", "recover_s", "typed_s")
        }
    print(json.dumps(shown), file=sys.stderr, flush=True)
