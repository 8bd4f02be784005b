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
from labs.race import breakeven, page, plots
from labs.race.campaign import Plan, execute
from labs.race.crew import ROOT, BedPlace, LoopbackPlace, Place
from labs.race.figures import Figures, Row
from labs.race.job import Recipe
from labs.race.methods import DEFAULT, DENSE, parse_methods
from labs.race.record import Record
from textgen.data import VALIDATION_WINDOWS
from textgen.model import SIZES
from textgen.prepare import prepare
from tools.netbed import Bed, parse_rate

LEARNING_RATES = {"nano": 3e-3, "micro": 1e-3, "small": 6e-4}


def parser(description: str | None = None) -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add("--hosts", type=int, default=2, help="2 to 8, one rank each (default: 2)")
    add("--rates", default="20mbit,100mbit,1gbit", help="of every link; unshaped is always added")
    add("--methods", default=",".join(DEFAULT), help=f"default: {','.join(DEFAULT)}")
    add("--model", default="nano", choices=sorted(SIZES), help="default: nano")
    add("--steps", type=int, default=300, help="the loss is compared after so many (default: 300)")
    add("--repeats", type=int, default=3, help="rounds, each with its own seed (default: 3)")
    add("--text", type=Path, help="UTF-8 file or folder (default: the embedded text)")
    add("--zero-stage", type=int, default=0, choices=(0, 1, 2), help="of dense DeepSpeed")
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
    add("--no-plots", action="store_true", help="draw nothing; needs no matplotlib")
    return flags


def make_plan(flags: argparse.Namespace) -> Plan:
    """What the flags ask for.

    Raises:
        ConfigError: they contradict each other or are out of range; lists every fault.
    """
    faults = []
    methods = parse_methods(flags.methods)
    rates: list[str | None] = [None]
    if flags.bed == "netns":
        rates = [*(r.strip() for r in flags.rates.split(",") if parse_rate(r) is not None), None]
    for name, least in (("hosts", 2), ("steps", 4), ("repeats", 1), ("batch", 1)):
        if getattr(flags, name) < least:
            faults.append(f"--{name} must be at least {least}, got {getattr(flags, name)}.")
    if flags.timing_steps < 2:
        faults.append(f"--timing-steps must be at least 2, got {flags.timing_steps}.")
    if flags.eval_sequences is not None and flags.eval_sequences < 1:
        faults.append(f"--eval-sequences must be at least 1, got {flags.eval_sequences}.")
    if flags.extend < 1.0:
        faults.append(f"--extend must be at least 1, got {flags.extend:g}.")
    if flags.zero_stage and any(method.prunes or method.side != "deepspeed" for method in methods):
        faults.append(
            "--zero-stage must be 0 unless all methods are dense_fp32 or dense_bf16: no other "
            f"knows it, got {flags.zero_stage}."
        )
    eval_every = flags.eval_every or max(1, flags.steps // 10)
    if flags.steps % eval_every:
        faults.append(f"--steps must be a multiple of --eval-every, got {flags.steps}.")
    dense_steps = max(2, flags.steps // 10) if flags.dense_steps is None else flags.dense_steps
    if not 2 <= dense_steps <= flags.steps - 2:
        faults.append(f"--dense-steps must be 2 to {flags.steps - 2}, got {dense_steps}.")
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
    machine = page.machine()
    record = Record(flags.out, plan, flags.resume)
    with open_place(flags) as place, tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(data, flags.text, flags.model)
        for visit in execute(plan, place, data, say, list(record.visits)):
            record.add(visit)
    runs = [run for visit in record.visits for run in visit]
    tokens_per_step = flags.hosts * flags.batch * SIZES[flags.model].context
    figures = Figures(runs, flags.hosts, flags.steps, tokens_per_step)
    rows = figures.rows()
    document = summarize(rows)
    lines = page.break_even_lines(
        document["break_even_method"], document["break_even_mbit"], document["break_even_checks"]
    )
    print(page.text_table(rows), f"\n{page.NOTE}", *lines, sep="\n", flush=True)
    if flags.out is not None:
        setting = page.setting(ROOT, machine) | {
            "parameters": figures.num_parameters,
            "tokens_per_step": tokens_per_step,
            "recipe": dataclasses.asdict(plan.recipe),
        }
        write_files(flags, setting, figures, rows, document, lines, plan)
    record.finish()
    return {
        "results": [row.contract() for row in rows],
        "break_even_mbit": document["break_even_mbit"],
    }


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


def write_files(
    flags: argparse.Namespace,
    setting: dict[str, Any],
    figures: Figures,
    rows: Sequence[Row],
    document: dict[str, Any],
    lines: Sequence[str],
    plan: Plan,
) -> None:
    """JSON with every step of every run, the page, and the pictures."""
    out: Path = flags.out
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = [one.to_json() for one in figures.runs]
    out.write_text(json.dumps({"setting": setting, **document, "runs": runs}) + "\n")
    pictures = [] if flags.no_plots else plots.write_all(figures, rows, out.with_suffix(""))
    machine, recipe = setting["machine"], setting["recipe"]
    facts = [
        f"- command: `{setting['command']}`",
        f"- commit {setting['commit']}, {setting['date']}",
        f"- {machine['cpu']}, {machine['cores']} cores for {flags.hosts} hosts, one thread each; "
        f"Linux {machine['kernel']}, Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        f"- load average at the start: {', '.join(f'{x:.1f}' for x in machine['load_average'])}",
        f"- {flags.model}, {setting['parameters']:,} parameters, {setting['tokens_per_step']} "
        f"tokens per step of all hosts; AdamW, lr {recipe['lr']:g}, beta2 {recipe['beta2']:g}; "
        f"{flags.steps} steps, {recipe['dense_steps']} of them dense where a compression begins "
        f"late; {flags.repeats} rounds; "
        f"{recipe['eval_sequences'] or VALIDATION_WINDOWS} validation sequences at most",
        *schedules(plan),
    ]
    parts = [
        f"# Ethernet: {flags.hosts} hosts, {flags.model}",
        "\n".join(facts),
        page.markdown_table(rows),
        page.NOTE,
        "\n".join(f"- {line}" for line in lines),
        *(f"![{path.stem}]({path.name})" for path in pictures),
    ]
    out.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def schedules(plan: Plan) -> list[str]:
    """What 1-bit Adam and 0/1 Adam did when, as items of a list. Pure."""
    lines = []
    for method in plan.methods:
        if method.interval is not None:
            policy = plan.recipe.policy(method.interval)
            lines.append(
                f"- {method.name}: second moment frozen after step {policy.var_freeze_step}, until "
                f"then the interval of its updates doubled after every {policy.var_update_scaler}; "
                f"then the interval of exchanges doubled after every {policy.local_step_scaler} "
                f"steps, to {policy.local_step_clipper} at most"
            )
        elif method.side == "simulated":
            lines.append(f"- {method.name}: dense for {plan.recipe.freeze_step} steps")
    return lines


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
