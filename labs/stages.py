"""What a ZeRO stage costs plain DeepSpeed and islands, a step, in one run.

Islands train over hosts behind slow links. Beside them plain DeepSpeed trains without such a link:
on every host alone ("alone", nothing between hosts, both at the same moment as islands do), or over
all hosts with the links unshaped ("together"). All engines live at the same time and train in
turns, so that what else the machine does falls on all of them alike. Memory is that of a process,
libraries included, so only differences count.

    python -m labs.stages --stages 0 2 3 --rates 100mbit --text FILE
    python -m labs.stages --stages 3 --zero '{"stage3_param_persistence_threshold": 1000000}'

Needs what benchmarks/ethernet.py needs. The last line of stdout is one JSON document, with seconds
of a step of the slowest rank.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from labs.machine import commit, machine
from labs.race.command import LEARNING_RATES, answer, prepare_data, say
from labs.race.crew import ROOT, BedPlace, Crew, crew, merge
from labs.race.job import Recipe
from labs.race.methods import DENSE
from tools.netbed import Bed

ISLANDS = "islands_0.01"
BLOCK = {"overlap": "auto", "warmup": "unpruned"}
DENSE_STEPS = 2


class SomeHosts:
    """Hosts of a bed whose links somebody else shapes.

    Args:
        bed: all hosts.
        hosts: which of them.
    """

    def __init__(self, bed: BedPlace, hosts: Sequence[int]) -> None:
        self.num_hosts = len(hosts)
        self._bed, self._hosts = bed, hosts

    def popen(self, host: int, words: list[str], **options: Any) -> subprocess.Popen[str]:
        """See `Place`."""
        return self._bed.popen(self._hosts[host], words, **options)

    def set_rate(self, rate: str | None) -> None:
        """See `Place`: the links belong to all crews."""

    def sent_bytes(self) -> list[int] | None:
        """See `Place`: not counted."""
        return None


class Case:
    """One way to train.

    Args:
        crews: they train at the same moment: one over all hosts, or one for each.
        rates: of the links, in turns; None: unshaped.

    Attributes:
        rates: see there.
        seconds: of every step that counts, by rate.
        memory: of the rank that holds most, in bytes, between steps and at most; with the number of
            the model's parameters.
    """

    def __init__(self, crews: Sequence[Crew], rates: Sequence[str | None]) -> None:
        self._crews = crews
        self.rates = rates
        self.seconds: dict[str | None, list[float]] = {rate: [] for rate in rates}
        self.memory = {"parameters": crews[0].num_parameters}

    def train(self, steps: int) -> list[float]:
        """Train on; the seconds of each step."""
        for ranks in self._crews:
            ranks.tell({"do": "train", "steps": steps, "eval_every": None})
        hosts = [ranks.hear() for ranks in self._crews]
        for name in ("rest_bytes", "peak_bytes"):
            self.memory[name] = max(answer[name] for answers in hosts for answer in answers)
        return [
            max(merge([answer["steps"][n] for answer in answers], 1).wall_s for answers in hosts)
            for n in range(steps)
        ]

    def take_turns(self, bed: BedPlace, steps: int) -> None:
        """One turn at every rate; its first step, after a pause, does not count."""
        for rate in self.rates:
            bed.set_rate(rate)
            self.seconds[rate] += self.train(1 + steps)[1:]
            bed.set_rate(None)


@contextlib.contextmanager
def opened(
    bed: BedPlace, recipe: Recipe, data: Path, flags: argparse.Namespace
) -> Iterator[dict[str, Case]]:
    """Start everything: label -> its case, after the warm-up."""
    hosts = range(bed.num_hosts)
    places = {
        "alone": [SomeHosts(bed, [host]) for host in hosts],
        "together": [SomeHosts(bed, hosts)],
    }
    with contextlib.ExitStack() as stack:
        found: dict[str, Case] = {}
        for zero in ["{}", *flags.zero]:
            for stage in flags.stages if zero == "{}" else flags.stages[-1:]:
                here = dataclasses.replace(recipe, zero_stage=stage, zero=zero)
                for name, method, where in (
                    (f"plain {flags.plain}", DENSE, places[flags.plain]),
                    ("islands", ISLANDS, places["together"]),
                ):
                    label = f"{name}, stage {stage}" + ("" if zero == "{}" else f", {zero}")
                    if method == DENSE and flags.islands_only:
                        continue
                    say(label)
                    crews = [
                        stack.enter_context(crew(place, method, here, data, seed=0))
                        for place in where
                    ]
                    rates = flags.rates.split(",") if method == ISLANDS else [None]
                    found[label] = case = Case(crews, rates)
                    case.train(DENSE_STEPS + 1)
        yield found


def measure(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train all cases in turns.

    Yields:
        After every round: label and rate -> median, quartiles and number of steps.

    Raises:
        GradPruneError: the bed or a rank failed.
    """
    recipe = Recipe(
        model=flags.model,
        micro_batch=flags.batch,
        lr=LEARNING_RATES[flags.model],
        beta2=0.99,
        weight_decay=0.1,
        clip_norm=1.0,
        lr_warmup_steps=1,
        dense_steps=DENSE_STEPS,
        steps=flags.rounds * (1 + flags.steps),
        zero_stage=0,
        budget_s=None,
        eval_sequences=None,
        ranks_per_host=flags.ranks_per_host,
        block=json.dumps(BLOCK),
        times_waits=False,
    )
    with Bed(hosts=flags.hosts) as hosts, tempfile.TemporaryDirectory() as folder:
        bed, data = BedPlace(hosts), Path(folder) / "data"
        prepare_data(data, flags)
        with opened(bed, recipe, data, flags) as cases:
            for number in range(flags.rounds):
                say(f"round {number + 1} of {flags.rounds}")
                for case in cases.values():
                    case.take_turns(bed, flags.steps)
                yield {
                    f"{label}, {rate or 'unshaped'}": row(case.seconds[rate]) | case.memory
                    for label, case in cases.items()
                    for rate in case.rates
                }


def row(seconds: Sequence[float]) -> dict[str, Any]:
    """What is told of a case's steps. Pure."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"step_s": round(middle, 4), "iqr_s": round(high - low, 4), "steps": len(seconds)}


def document(flags: argparse.Namespace) -> dict[str, Any]:
    """What is printed last, and written after every round: a run may be interrupted."""
    found: dict[str, Any] = {
        "machine": machine(),
        "commit": commit(ROOT),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "flags": {name: str(value) for name, value in vars(flags).items()},
    }
    for cases in measure(flags):
        found["cases"] = cases
        if flags.out is not None:
            flags.out.write_text(json.dumps(found, indent=1) + "\n")
    for label, figures in found["cases"].items():
        print(f"{figures['step_s']:7.3f} s ({figures['iqr_s']:.3f}) {label}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = flags.add_argument
    add("--hosts", type=int, default=2, help="default: 2")
    add("--ranks-per-host", type=int, default=2, help="they form an island (default: 2)")
    add("--stages", type=int, nargs="+", default=[0, 2, 3], help="of ZeRO (default: 0 2 3)")
    add("--zero", nargs="*", default=[], help="JSON: the last stage with these keys, too")
    add("--rates", default="100mbit", help="of the islands' links, in turns (default: 100mbit)")
    add("--plain", choices=("alone", "together"), default="alone", help="default: alone")
    add("--islands-only", action="store_true", help="without plain DeepSpeed")
    add("--model", default="micro", choices=sorted(LEARNING_RATES), help="default: micro")
    add("--batch", type=int, default=2, help="sequences per rank and step (default: 2)")
    add("--rounds", type=int, default=5, help="turns of every case (default: 5)")
    add("--steps", type=int, default=4, help="of a turn that count (default: 4)")
    add("--text", type=Path, help="UTF-8 file or folder (default: the embedded text)")
    add("--out", type=Path, help="JSON file")
    given = flags.parse_args(arguments)
    return answer(lambda: document(given))


if __name__ == "__main__":
    sys.exit(main())
