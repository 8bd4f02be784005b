"""Islands that exchange every few steps, under the law that chooses when and how much.

Beside it the same law at fixed intervals. See `rounds_plant` for what is simulated. Settle and late
count exchanges, as 95th percentiles. A law is settled once the median of five exchanges' steps is
at most 1.02 of the budget, and it sends 0.6 of the oracle's elements per step. The rest are shares
of steps.

    python -m labs.control rounds --seeds 10 --steps 12000 --out FILE.json

The last line of stdout is one JSON document: under `laws`, for each law, the columns of the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_gradprune.errors import ConfigError, GradPruneError
from labs.control import page, traces
from labs.control.losses import make_losses
from labs.control.plant import BUDGET_S
from labs.control.rounds_plant import LAWS, STRETCH, Exchange, Plant, run, stretched
from labs.control.tally import Sums
from labs.control.traces import Trace
from labs.machine import machine
from labs.race.page import setting
from labs.race.plots import load_pyplot

ROOT = Path(__file__).resolve().parents[2]
HOSTS = (2, 8)

BEGIN_STEPS = STRETCH * traces.BEGIN_STEPS
MEDIAN_OF, LATE_WITHIN, SHARE = 5, 20, 0.6
STATIONARY_STEPS = STRETCH * 1000
DRAWN = ("auto, hidden", "auto, waited for")

COLUMNS = (
    ("settle_down_p95", "settle down", ".0f"),
    ("settle_up_p95", "settle up", ".0f"),
    ("late_down_p95", "late down", ".0f"),
    ("in_budget", "in budget", ".1%"),
    ("share_vs_oracle", "elements / oracle", ".3f"),
    ("interval_vs_oracle", "interval / oracle", ".2f"),
    ("stationary_changes", "stationary changes", ".0f"),
    ("update_us", "update us", ".1f"),
)

NOTE = (
    "Settle: exchanges from the first at a new rate to the first from which the median of five "
    "exchanges' steps is at most 1.02 of the budget and the elements sent per step are at least "
    "0.6 of the oracle's, 95th percentile. Late: exchanges over budget among the first 20 after a "
    "fall, 95th percentile. In budget: of the steps that the oracle met. The oracle knows every "
    "rate beforehand, not an exchange's chance. It takes the shortest interval from 4 on at which "
    "3 % fit, and leaves two standard deviations. Stationary changes: the most moves of density or "
    "interval in the last 16,000 steps of a run. Update: processor time, median over runs."
)


@dataclass(slots=True)
class Tally(Sums):
    """What is summed over the runs of one law.

    Settled and late are counted in exchanges, all else in steps.

    Attributes:
        log_share, log_interval: sums over steps of logarithms over the oracle's.
    """

    log_share: float = 0.0
    log_interval: float = 0.0

    def add(self, passed: Sequence[Exchange], trace: Trace, update_s: float) -> None:
        """One run."""
        self.update_us.append(1e6 * update_s)
        later = [x for x in passed if x.step - x.interval >= BEGIN_STEPS]
        for x in later:
            if x.oracle_s <= BUDGET_S:
                self.meetable += x.interval
                self.met += x.interval * (x.step_s <= BUDGET_S)
            self.log_share += x.interval * math.log(x.share / x.oracle_share)
            self.log_interval += x.interval * math.log(x.interval / x.oracle_interval)
            self.steps += x.interval
        if trace.name == "stationary":
            last = [x for x in later if x.step >= len(trace.rates) - STATIONARY_STEPS]
            moves = sum(
                (a.density, a.interval) != (b.density, b.interval)
                for a, b in itertools.pairwise(last)
            )
            self.stationary.append(moves)
        self._settle(passed, trace)

    def _settle(self, passed: Sequence[Exchange], trace: Trace) -> None:
        moves = trace.changes()
        ends = [*(step for step, _ in moves), len(trace.rates)][1:]
        for (begin, factor), end in zip(moves, ends, strict=True):
            after = [x for x in passed if begin <= x.step < end]
            if len(after) < MEDIAN_OF + LATE_WITHIN:
                continue  # too short a stretch for so long an interval
            settled = next(
                (
                    i
                    for i in range(len(after) - MEDIAN_OF + 1)
                    if statistics.median(x.step_s for x in after[i : i + MEDIAN_OF])
                    <= 1.02 * BUDGET_S
                    and after[i].share >= SHARE * after[i].oracle_share
                ),
                len(after),
            )
            (self.up if factor > 1.0 else self.down).append(settled)
            if factor < 1.0:
                self.late.append(
                    sum(x.step_s > BUDGET_S >= x.oracle_s for x in after[:LATE_WITHIN])
                )

    def shares(self) -> dict[str, float | None]:
        """See `Sums`."""
        steps = self.steps
        return {
            "share_vs_oracle": math.exp(self.log_share / steps) if steps else None,
            "interval_vs_oracle": math.exp(self.log_interval / steps) if steps else None,
        }


def run_all(
    names: Sequence[str], seeds: int, steps: int, say: Any = lambda text: None
) -> dict[str, dict[str, Any]]:
    """Every law on every link: its figures, and under `links` those of each kind."""
    tallies: dict[str, dict[str, Tally]] = {name: {} for name in names}
    for kind in traces.KINDS:
        say(f"link {kind}: {seeds} seeds, hosts {HOSTS}")
        for hosts in HOSTS:
            for seed in range(seeds):
                trace = stretched(kind, seed, steps)
                losses = make_losses("healthy", seed, len(trace.rates))
                plant = Plant(trace, hosts, seed)
                for name in names:
                    passed, update_s = run(name, plant, losses)
                    tallies[name].setdefault(kind, Tally()).add(passed, trace, update_s)
    laws = {}
    for name, kinds in tallies.items():
        whole = Tally().merge(list(kinds.values())).figures()
        laws[name] = whole | {"links": {kind: tally.figures() for kind, tally in kinds.items()}}
    return laws


def draw(path: Path, steps: int) -> None:
    """Interval, density and step time on one link, the oracle's interval dashed."""
    pyplot = load_pyplot()
    trace = stretched("steps", 0, steps)
    losses = make_losses("healthy", 0, len(trace.rates))
    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(9, 8))
    for name in DRAWN:
        passed, _ = run(name, Plant(trace, HOSTS[1], 0), losses)
        steps_at = [x.step for x in passed]
        axes[0].step(steps_at, [x.interval for x in passed], lw=1.2, label=name)
        axes[1].plot(steps_at, [x.density for x in passed], lw=1.0, label=name)
        axes[2].plot(steps_at, [x.step_s for x in passed], lw=0.7, label=name)
        if name == DRAWN[0]:
            oracle = [x.oracle_interval for x in passed]
            axes[0].step(steps_at, oracle, color="black", ls="--", lw=0.8, label="oracle, hidden")
    axes[0].set_yscale("log", base=2)
    axes[0].set_ylabel("interval, steps")
    axes[0].legend(fontsize=8)
    axes[1].set_yscale("log")
    axes[1].set_ylabel("density")
    axes[2].axhline(BUDGET_S, color="black", lw=0.8)
    axes[2].set_ylim(0.5, 2.0)
    axes[2].set_ylabel("step time, s")
    axes[2].set_xlabel(f"step; link {trace.name}, {HOSTS[1]} hosts")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        prog="python -m labs.control rounds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = flags.add_argument
    add("--seeds", type=int, default=10, help="runs of each trace and number of hosts")
    add("--steps", type=int, default=12000, help="of each run (default: 12000)")
    add("--laws", default=";".join(LAWS), help=f"default: {';'.join(LAWS)}")
    add("--out", type=Path, help="JSON file; a page (.md) and a picture are put beside it")
    add("--no-plots", action="store_true", help="draw nothing; needs no matplotlib")
    return flags


def check(flags: argparse.Namespace) -> list[str]:
    """The names of the laws.

    Raises:
        ConfigError: a flag is out of range; lists every fault.
    """
    names = [name.strip() for name in flags.laws.split(";") if name.strip()]
    faults = []
    if not names or set(names) - set(LAWS):
        faults.append(f"--laws must be of {'; '.join(LAWS)}, got {flags.laws!r}.")
    if flags.seeds < 1:
        faults.append(f"--seeds must be at least 1, got {flags.seeds}.")
    if flags.steps < 3 * BEGIN_STEPS:
        faults.append(f"--steps must be at least {3 * BEGIN_STEPS}, got {flags.steps}.")
    if faults:
        raise ConfigError(faults)
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    flags = parser().parse_args(arguments)
    try:
        names = check(flags)
        if flags.out is not None and not flags.no_plots:
            load_pyplot()  # missing: say so now, not at the end
        began_s, at_start = time.monotonic(), machine()
        laws = run_all(names, flags.seeds, flags.steps, lambda text: print(text, file=sys.stderr))
        print(page.text_table(page.rows_of(laws, COLUMNS, "law")))
        if flags.out is not None:
            about = setting(ROOT, at_start) | {"duration_s": round(time.monotonic() - began_s)}
            _write(flags, about, laws)
    except GradPruneError as exc:
        print(f"error: {exc}", file=sys.stderr, flush=True)
        return 2
    shown = [key for key, _, _ in COLUMNS]
    document = {"laws": {name: {key: laws[name][key] for key in shown} for name in names}}
    print(json.dumps(document), flush=True)
    return 0


def _write(flags: argparse.Namespace, about: dict[str, Any], laws: dict[str, Any]) -> None:
    out: Path = flags.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"setting": about, "laws": laws}) + "\n", encoding="utf-8")
    pictures = []
    if not flags.no_plots:
        pictures.append(out.with_suffix(".png"))
        draw(pictures[0], flags.steps)
    facts = [
        f"one thread, {about['duration_s']} s",
        f"{flags.seeds} seeds of each trace with {HOSTS[0]} and with {HOSTS[1]} hosts, "
        f"{flags.steps} steps each, every rate {STRETCH} times as long as on the page of the laws",
    ]
    parts = [page.markdown_table(page.rows_of(laws, COLUMNS, "law")), NOTE]
    columns = [column for column in COLUMNS if column[0] != "update_us"]
    for name in list(laws)[:2]:
        parts.append(f"## {name}, link by link")
        parts.append(page.markdown_table(page.rows_of(laws[name]["links"], columns, "link")))
    page.write(out, "Islands whose interval the law chooses", about, facts, parts, pictures)
