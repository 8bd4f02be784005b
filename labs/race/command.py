"""The command line of benchmarks/ethernet.py: flags to plan, runs to files."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ds_gradprune.errors import ConfigError, GradPruneError
from labs.machine import machine
from labs.race import breakeven, files, page, plots
from labs.race.campaign import Plan, execute
from labs.race.crew import ROOT, BedPlace, LoopbackPlace, Place
from labs.race.figures import Figures, Row
from labs.race.job import Recipe
from labs.race.methods import DEFAULT, DENSE, Method, parse_methods
from labs.race.record import Record
from labs.smollm2 import export, model_folder
from textgen.model import SIZES
from textgen.prepare import prepare
from tools.netbed import Bed, parse_rate

LEARNING_RATES = {"nano": 3e-3, "micro": 1e-3, "small": 6e-4, "smollm2": 1e-4}


LEAST = {
    "hosts": 2,
    "ranks-per-host": 1,
    "steps": 4,
    "repeats": 1,
    "batch": 1,
    "timing-steps": 2,
    "eval-sequences": 1,
    "extend": 1,
}


def parser(description: str | None = None) -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add("--hosts", type=int, default=2, help="2 to 8 (default: 2)")
    add("--ranks-per-host", type=int, default=1, help="they form an island (default: 1)")
    add("--rates", default="20mbit,100mbit,1gbit", help="of every link; unshaped is always added")
    add("--methods", default=",".join(DEFAULT), help=f"default: {','.join(DEFAULT)}")
    add("--model", default="nano", choices=sorted(LEARNING_RATES), help="default: nano")
    add("--steps", type=int, default=300, help="the loss is compared after so many (default: 300)")
    add("--repeats", type=int, default=3, help="rounds, each with its own seed (default: 3)")
    add("--text", type=Path, help="UTF-8 file or folder (default: the embedded text)")
    add("--zero-stage", type=int, default=0, choices=(0, 1, 2, 3), help="of DeepSpeed")
    add("--resume", action="store_true", help="go on with an interrupted campaign of this --out")
    add("--out", type=Path, help="JSON file; a page (.md) and pictures are put beside it")
    add("--bed", choices=("netns", "none"), default="netns", help="none: loopback, unshaped")
    add("--batch", type=int, default=4, help="sequences per rank and step (default: 4)")
    add("--lr", type=float, help=f"for all methods (default, by model: {LEARNING_RATES})")
    add("--beta2", type=float, default=0.99, help="of AdamW, for all methods (default: 0.99)")
    add("--dense-steps", type=int, help="before a compression begins (default: a tenth)")
    add("--timing-steps", type=int, default=8, help="of a short stretch at a rate (default: 8)")
    add("--eval-every", type=int, help="steps between validations (default: a tenth)")
    add("--eval-sequences", type=int, help="of the validation text, over all ranks (default: all)")
    add(
        "--extend", type=float, default=1.5, help="all but dense_fp32 train so many times the steps"
    )
    add("--budget-s", type=float, help="step time budget of ours (default: its own default)")
    add("--block", help="JSON: more keys of gradient_pruning for ours and islands")
    add("--no-plots", action="store_true", help="draw nothing; needs no matplotlib")
    return flags


def make_plan(flags: argparse.Namespace) -> Plan:
    """What the flags ask for.

    Raises:
        ConfigError: they contradict each other or are out of range; lists every fault.
    """
    methods = parse_methods(flags.methods)
    rates: list[str | None] = [None]
    if flags.bed == "netns":
        rates = [*(r.strip() for r in flags.rates.split(",") if parse_rate(r) is not None), None]
    eval_every = flags.eval_every or max(1, flags.steps // 10)
    dense_steps = max(2, flags.steps // 10) if flags.dense_steps is None else flags.dense_steps
    faults = list(faults_of(flags, methods, eval_every, dense_steps))
    if faults:
        raise ConfigError(faults)
    return Plan(
        methods=methods,
        rates=rates,
        rounds=flags.repeats,
        steps=flags.steps,
        extend=flags.extend,
        eval_every=eval_every,
        timing_steps=flags.timing_steps,
        recipe=make_recipe(flags, dense_steps),
    )


def faults_of(
    flags: argparse.Namespace, methods: Sequence[Method], eval_every: int, dense_steps: int
) -> Iterator[str]:
    """Everything that is wrong with the flags."""
    for name, least in LEAST.items():
        given = getattr(flags, name.replace("-", "_"))
        if given is not None and given < least:
            yield f"--{name} must be at least {least}, got {given:g}."
    if not _is_object(flags.block):
        yield f"--block must be a JSON object, got {flags.block}."
    strangers = [method.name for method in methods if method.side != "deepspeed"]
    if flags.zero_stage and strangers:
        yield (
            f"--zero-stage must be 0 for methods that do not run in DeepSpeed "
            f"({', '.join(strangers)}), got {flags.zero_stage}. Name the others with --methods."
        )
    if flags.steps % eval_every:
        yield f"--steps must be a multiple of --eval-every, got {flags.steps}."
    if not 2 <= dense_steps <= flags.steps - 2:
        yield f"--dense-steps must be 2 to {flags.steps - 2}, got {dense_steps}."


def _is_object(text: str | None) -> bool:
    try:
        return isinstance(json.loads(text or "{}"), dict)
    except ValueError:
        return False


def make_recipe(flags: argparse.Namespace, dense_steps: int) -> Recipe:
    """How the flags ask to train. Pure."""
    return Recipe(
        model=flags.model,
        micro_batch=flags.batch,
        lr=flags.lr or LEARNING_RATES[flags.model],
        beta2=flags.beta2,
        weight_decay=0.1,
        clip_norm=1.0,
        lr_warmup_steps=max(1, flags.steps // 15),
        dense_steps=dense_steps,
        steps=flags.steps,
        zero_stage=flags.zero_stage,
        budget_s=flags.budget_s,
        eval_sequences=flags.eval_sequences,
        ranks_per_host=getattr(flags, "ranks_per_host", 1),  # other laboratories have no such flag
        block=getattr(flags, "block", None),
    )


@contextlib.contextmanager
def open_place(flags: argparse.Namespace) -> Iterator[Place]:
    """Where the ranks run."""
    if flags.bed == "none":
        yield LoopbackPlace(flags.hosts)
        return
    with Bed(hosts=flags.hosts) as bed:
        yield BedPlace(bed)


def run(flags: argparse.Namespace) -> dict[str, Any]:
    """Make all runs, print the table, write the files.

    Returns:
        The document of the last line.

    Raises:
        GradPruneError: the bed, the flags or a run failed.
    """
    plan = make_plan(flags)
    if not flags.no_plots and flags.out is not None:
        plots.load_pyplot()  # missing: say so now, not after an hour
    here = machine()
    record = Record(flags.out, plan, flags.resume)
    with open_place(flags) as place, tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare_data(data, flags)
        for visit in execute(plan, place, data, say, list(record.visits)):
            record.add(visit)
    runs = [run for visit in record.visits for run in visit]
    tokens_per_step = flags.hosts * flags.ranks_per_host * flags.batch * plan.recipe.seq_len
    figures = Figures(runs, flags.hosts, flags.steps, tokens_per_step)
    rows = figures.rows()
    document = summarize(rows)
    lines = page.break_even_lines(
        document["break_even_method"], document["break_even_mbit"], document["break_even_checks"]
    )
    print(page.text_table(rows), f"\n{page.NOTE}", *lines, sep="\n", flush=True)
    if flags.out is not None:
        setting = page.setting(ROOT, here) | {
            "parameters": figures.num_parameters,
            "tokens_per_step": tokens_per_step,
            "recipe": dataclasses.asdict(plan.recipe),
        }
        files.write(flags, setting, figures, rows, document, lines, plan)
    record.finish()
    return {
        "results": [row.contract() for row in rows],
        "break_even_mbit": document["break_even_mbit"],
    }


def prepare_data(data: Path, flags: argparse.Namespace) -> None:
    """Tokens, tokenizer, and where it is no size of textgen the model, for all ranks."""
    if flags.model in SIZES:
        prepare(data, flags.text, flags.model)
        return
    export(model_folder(data))
    prepare(data, flags.text, str(model_folder(data)))


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows, and the break-even of the first topk method. Pure."""
    unshaped = {row.method: breakeven.cost_of(row) for row in rows if row.rate_mbit is None}
    method = next((name for name in unshaped if name.startswith("topk_")), None)
    dense, pruned = unshaped.get(DENSE), unshaped.get(method or "")
    if dense is None or pruned is None:
        return {
            "results": [dataclasses.asdict(row) for row in rows],
            "break_even_method": None,
            "break_even_mbit": None,
            "break_even_checks": [],
        }
    return {
        "results": [dataclasses.asdict(row) for row in rows],
        "break_even_method": method,
        "break_even_mbit": breakeven.break_even_mbit(dense, pruned),
        "break_even_checks": breakeven.check(rows, DENSE, method or ""),
    }


def main(arguments: Sequence[str] | None = None, description: str | None = None) -> int:
    """Run the script; returns its exit code."""
    flags = parser(description).parse_args(arguments)
    hint = "" if flags.out is None else " Continue with the same flags and --resume."
    return answer(lambda: run(flags), hint)


def answer(work: Callable[[], dict[str, Any]], hint: str = "") -> int:
    """Print the document that `work` makes as the last line; returns the script's exit code.

    Args:
        work: ends with GradPruneError where the user has to act; SIGTERM interrupts it like Ctrl-C.
        hint: is said after an interruption.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        document = work()
    except GradPruneError as exc:
        print(f"error: {exc}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"Interrupted.{hint}", file=sys.stderr, flush=True)
        return 130
    print(json.dumps(document), flush=True)
    return 0


def say(text: str) -> None:
    """Tell what goes on, with the time of day, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt
