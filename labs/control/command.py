"""The command line of the simulator."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_gradprune.errors import ConfigError, GradPruneError
from labs.control import page, replay, traces
from labs.control.campaign import HOSTS, follow, run_all
from labs.control.laws import NAMES
from labs.control.traces import BEGIN_STEPS
from labs.machine import machine
from labs.race.page import setting
from labs.race.plots import load_pyplot

DRAWN = ("predictive", "stepwise", "seed_0.7", "model_cusum")
LEAST_STEPS = 3 * BEGIN_STEPS

ROOT = Path(__file__).resolve().parents[2]


def parser(description: str | None = None) -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        prog="python -m labs.control",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = flags.add_argument
    add("--seeds", type=int, default=20, help="runs of each trace and number of hosts")
    add("--steps", type=int, default=2000, help="of each run (default: 2000)")
    add("--laws", default=",".join(NAMES), help=f"default: {','.join(NAMES)}")
    add(
        "--replay",
        type=Path,
        help="a run recorded by `python -m labs.control bed --out`: its link for all laws, and the "
        "run itself once more in the simulator, beside what was recorded",
    )
    add("--out", type=Path, help="JSON file; a page (.md) and a picture are put beside it")
    add("--no-plots", action="store_true", help="draw nothing; needs no matplotlib")
    return flags


def check(flags: argparse.Namespace) -> list[str]:
    """The names of the laws.

    Raises:
        ConfigError: a flag is out of range; lists every fault.
    """
    faults = []
    names = [name.strip() for name in flags.laws.split(",") if name.strip()]
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        faults.append(f"--laws must be of {', '.join(NAMES)}, got {flags.laws!r}.")
    if flags.seeds < 1:
        faults.append(f"--seeds must be at least 1, got {flags.seeds}.")
    if flags.steps < LEAST_STEPS:
        faults.append(f"--steps must be at least {LEAST_STEPS}, got {flags.steps}.")
    if faults:
        raise ConfigError(faults)
    return names


def run(flags: argparse.Namespace) -> dict[str, Any]:
    """Simulate, print the table, write the files.

    Returns:
        The document of the last line.

    Raises:
        GradPruneError: a flag is wrong, or matplotlib is missing where it is needed.
    """
    names = check(flags)
    if flags.out is not None and not flags.no_plots:
        load_pyplot()  # missing: say so now, not at the end
    agreement = None
    if flags.replay is not None:
        recording = replay.read(flags.replay)
        agreement = replay.compare(recording, replay.simulate(recording))
        traces.add_recorded(flags.replay.stem, replay.measured_rates(recording))
    began_s, at_start = time.monotonic(), machine()
    laws = run_all(names, flags.seeds, flags.steps, lambda text: print(text, file=sys.stderr))
    print(page.text_table(page.rows_of(laws, page.COLUMNS, "law")))
    for name in names[:1]:
        print()
        print(page.text_table(page.rows_of(laws[name]["links"], page.LINK_COLUMNS, name)))
        print()
        print(page.text_table(page.rows_of(laws[name]["losses"], page.LOSS_COLUMNS, name)))
    print(page.NOTE)
    if agreement is not None:
        print(f"\nThe recorded run and its simulation ({flags.replay.name}):")
        print(page.text_table(replay.rows_of(agreement)))
    if flags.out is not None:
        about = setting(ROOT, at_start) | {"duration_s": round(time.monotonic() - began_s)}
        write_files(flags, names, about, laws, agreement)
    shown = [key for key, _, _ in page.COLUMNS]
    document = {"laws": {name: {key: laws[name][key] for key in shown} for name in names}}
    return document if agreement is None else document | {"replay": agreement}


def write_files(
    flags: argparse.Namespace,
    names: list[str],
    about: dict[str, Any],
    laws: dict[str, Any],
    agreement: dict[str, Any] | None,
) -> None:
    """JSON, page and picture."""
    out: Path = flags.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps({"setting": about, "laws": laws, "replay": agreement}) + "\n", encoding="utf-8"
    )
    pictures = []
    if not flags.no_plots:
        drawn = [name for name in DRAWN if name in names] or names[:1]
        courses = follow(drawn, "steps", HOSTS[0], 0, flags.steps)
        pictures.append(out.with_suffix(".png"))
        page.draw(courses, pictures[0])
    facts = [
        f"one thread, {about['duration_s']} s",
        f"{flags.seeds} seeds of each trace with {HOSTS[0]} and with {HOSTS[1]} hosts, "
        f"{flags.steps} steps each; figures over all of them",
    ]
    parts = page.tables_of(laws)
    if agreement is not None:
        parts.append(f"## The recorded run and its simulation: {flags.replay.name}")
        parts.append(page.markdown_table(replay.rows_of(agreement)))
    page.write(out, "Control laws on simulated links", about, facts, parts, pictures)


def main(arguments: Sequence[str] | None = None, description: str | None = None) -> int:
    """Run the script; returns its exit code."""
    flags = parser(description).parse_args(arguments)
    try:
        document = run(flags)
    except GradPruneError as exc:
        print(f"error: {exc}", file=sys.stderr, flush=True)
        return 2
    print(json.dumps(document), flush=True)
    return 0
