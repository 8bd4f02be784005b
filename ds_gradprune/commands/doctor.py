"""`ds-gradprune doctor`: does pruning pay on these hosts, this link and this model?

This process measures nothing itself and loads no torch: agents on the hosts do.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ds_gradprune.commands import doctor_page, pairs
from ds_gradprune.commands.diagnosis import (
    DENSITIES,
    Column,
    Exchange,
    assumed,
    diagnose,
    emulated,
)
from ds_gradprune.commands.doctor_plan import Plan, decay_of, read_plan, settings_of
from ds_gradprune.commands.flags import Parser, above_zero, count, not_negative, numbers, several
from ds_gradprune.commands.forecast import Job, Link, Setting, exchange_bytes, wait_s
from ds_gradprune.commands.hostfile import HostLine, read_hostfile
from ds_gradprune.commands.hosts import Hosts
from ds_gradprune.errors import TransportError

PAYS, DOES_NOT_PAY = 0, 3
"""Exit codes; a fault is 2."""

RATES = (10.0, 100.0, 1000.0)
"""Mbit/s of links that are emulated where there is one host."""

BUSY_SHARE = 0.1
"""Of a host's cores: where others keep more of them busy, measured times are doubted."""

UNEVEN = 1.3
"""Upper over lower quartile of the measured steps, above which they are doubted as well."""

LOCAL_S = 1800.0
"""A host that has not measured a step within so long hangs."""


def parser() -> Parser:
    """The flags."""
    flags = Parser(
        "doctor",
        "Measure hosts, links and a step of a model, and say whether pruning pays.",
        epilog="Exit codes: 0 pruning pays, 3 it does not, 2 a fault.",
    )
    add = flags.add_argument
    add("--hostfile", type=Path, help="DeepSpeed's; without it this host alone, links emulated")
    add(
        "--model",
        default="nano",
        help="nano (1M parameters), micro (10M), small (124M), a number such as 350M, or a model "
        "folder (default: nano)",
    )
    add("--config", help="DeepSpeed's JSON file: batch, precision, ZeRO stage, our block")
    add("--rates", type=numbers, help="links to compare with, Mbit/s, as on their labels: 10,100")
    add("--latency-ms", type=not_negative, default=0.5, help="of emulated links (default: 0.5)")
    add("--islands", type=several, default=2, help="hosts to emulate on one host (default: 2)")
    add(
        "--batch", type=count, help="sequences of a micro-step (default: the configuration's, or 4)"
    )
    add("--tokens", type=count, help="of a sequence (default: what the model sees, at most 1024)")
    add("--step-s", type=above_zero, help="seconds of a step without exchange, if you know them")
    add("--json", action="store_true", help="one JSON document instead of a page")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Raises:
        GradPruneError: the flags, the configuration, a host or a link is faulty.
    """
    flags = parser().parse_args(arguments)
    plan = read_plan(flags.config, flags.batch)
    lines = read_hostfile(flags.hostfile) if flags.hostfile else [HostLine("localhost")]
    if len(lines) > 1 and not flags.rates:
        flags.rates = ()
    tell = _teller(flags.json)
    tell(f"starting on {', '.join(line.name for line in lines)}")
    with Hosts(lines, os.environ) as hosts:
        found = examine(hosts, lines, plan, flags, tell)
    if flags.json:
        more = {"hosts": found.facts, "doubts": found.doubts}
        print(json.dumps(found.diagnosis.as_json() | more))
    else:
        print(doctor_page.page(found))
    return PAYS if found.diagnosis.pays else DOES_NOT_PAY


def examine(
    hosts: Hosts,
    lines: Sequence[HostLine],
    plan: Plan,
    flags: Any,
    tell: Callable[[str], object],
) -> doctor_page.Findings:
    """Measure everything."""
    islands = len(lines) if len(lines) > 1 else flags.islands
    notes: list[str] = []
    links: list[pairs.Pair] = []
    latency_s, columns = 1e-3 * flags.latency_ms, list[Column]()
    if len(lines) > 1:
        links = pairs.measure(hosts, tell)
        rate_mbit = min(pair.both_mbit for pair in links)
        latency_s = max(pair.latency_s for pair in links)
        try:
            tell("collectives over gloo")
            link = pairs.collectives(hosts, rate_mbit)
        except TransportError as exc:
            notes.append(
                f"gloo cannot connect these hosts, so training would fail, too: {exc} Set "
                "GLOO_SOCKET_IFNAME on all hosts; see launch/README.md."
            )
            link = Link.ideal(latency_s, islands)
        columns.append(Column("measured", rate_mbit, link, is_measured=True))
        columns += assumed(flags.rates, link, rate_mbit)
    else:
        columns = emulated(flags.rates or RATES, latency_s, islands)
    local = measure_local(hosts, lines, plan, flags, islands, columns, tell)
    job = job_of(local, lines, plan, islands, flags.step_s)
    found = diagnose(job, columns, exchanges_of(local, plan, islands), latency_s)
    return doctor_page.Findings(
        diagnosis=found,
        facts=hosts.facts,
        pairs=links,
        local=local[0],
        plan_text=_plan_text(flags, plan, local[0]),
        warmup_steps=plan.block.warmup_steps if plan.block.warmup_form == "dense" else 0,
        block_warmup_steps=plan.block.warmup_steps,
        notes=[*notes, *notes_of(hosts, plan)],
        doubts=doubts_of(hosts.facts, local),
    )


def measure_local(
    hosts: Hosts,
    lines: Sequence[HostLine],
    plan: Plan,
    flags: Any,
    islands: int,
    columns: Sequence[Column],
    tell: Callable[[str], object],
) -> list[dict[str, Any]]:
    """A step and the codec on every host, at once, as in training."""
    tell(f"a step of {flags.model}, and the codec")
    model = flags.model
    if Path(model).is_dir():
        model = str(Path(model).resolve())
    is_emulated = len(lines) == 1
    # The first host's line on a link is emulated as well: the forecast can be compared with it.
    rates = [(c.rate_mbit, c.link.gather_call_s) for c in columns] if is_emulated else []
    block = plan.block
    return hosts.together(
        "local",
        LOCAL_S,
        model=model,
        batch=plan.batch,
        tokens=flags.tokens,
        is_bf16=plan.is_bf16,
        stage=plan.stage,
        min_numel=block.min_numel,
        densities=DENSITIES,
        decays=sorted({decay_of(s.interval, block) for s in settings_of(block)}, key=str),
        islands=min(islands, 8),
        shards=lines[0].slots,
        value_bits=block.value_bits,
        step_s=flags.step_s,
        links=rates,
    )


def job_of(
    local: Sequence[dict[str, Any]],
    lines: Sequence[HostLine],
    plan: Plan,
    islands: int,
    step_s: float | None,
) -> Job:
    """What is trained, with the slowest host's time."""
    steps = [found["step"] for found in local]
    late_s = watch_s = 0.0
    if step_s is None:
        step_s = max(plan.accumulation * s["micro_s"] + s["optimizer_s"] for s in steps)
        # Pruned gradients leave no weights to watch.
        watch_s = max(s["watch_s"] for s in steps) if plan.block.prune == "update" else 0.0
        spread = [s["steps_s"] for s in steps] * (1 if len(steps) > 1 else islands)
        late_s = math.sqrt(plan.accumulation) * wait_s(spread)
    return Job(
        numel=local[0]["numel"],
        islands=islands,
        ranks=islands * lines[0].slots,
        compute_s=step_s,
        stage=plan.stage,
        accumulation=plan.accumulation,
        element_bytes=2 if plan.is_bf16 else 4,
        tokens=plan.batch * plan.accumulation * local[0]["tokens"] * lines[0].slots,
        watch_s=watch_s,
        wait_s=late_s,
    )


def exchanges_of(
    local: Sequence[dict[str, Any]], plan: Plan, islands: int
) -> dict[Setting, Exchange]:
    """The cost of an exchange by setting, on the slowest host."""
    block, found = plan.block, {}
    owners = block.exchange_of(islands) == "owner_reduce"
    for setting in settings_of(block):
        decay = decay_of(setting.interval, block)
        rows = [
            row | {"codec_s": facts["around_s"] + row["codec_s"]}
            for facts in local
            for row in facts["exchanges"]
            if row["density"] == setting.density and row["decay"] == decay
        ]
        wire_bytes = exchange_bytes(rows[0]["payload_bytes"], islands, owners=owners)
        delay_steps = block.model_copy(update={"sync_every": setting.interval}).delay_steps
        found[setting] = Exchange(max(row["codec_s"] for row in rows), wire_bytes, delay_steps)
    return found


def doubts_of(facts: Sequence[dict[str, Any]], local: Sequence[dict[str, Any]]) -> list[str]:
    """Why measured times may not be those of a run. Pure.

    Args:
        facts: of every host.
        local: what each has measured.
    """
    doubts = []
    for mine, found in zip(facts, local, strict=True):
        host, step = mine["host"], found["step"]
        if step is None:
            continue
        others = step["others"]
        if others is not None and others > BUSY_SHARE * mine["cores"]:
            doubts.append(
                f"{host}: other programs kept {others:.1f} of its {mine['cores']} cores busy while "
                "the step was measured. Unless they run during training as well, its step is "
                "shorter than told here: end them and ask again, or give --step-s."
            )
        lower, upper = step["steps_s"][0], step["steps_s"][-1]
        if upper > UNEVEN * lower:
            doubts.append(
                f"{host}: a quarter of the measured steps took at most "
                f"{doctor_page.seconds(lower)}, another at least {doctor_page.seconds(upper)}. "
                "Forecasts are as uncertain as that."
            )
    return doubts


def notes_of(hosts: Hosts, plan: Plan) -> list[str]:
    """What the user should know besides."""
    notes = []
    if len(hosts.agents) > 1:
        names = [set(f["environment"]) for f in hosts.facts]
        if not all("GLOO_SOCKET_IFNAME" in name for name in names):
            notes.append(
                "GLOO_SOCKET_IFNAME is not set on every host: gloo then takes the address that the "
                "host's own name stands for."
            )
        for package in ("torch", "deepspeed", "ds_gradprune", "numpy"):
            found = {f["versions"][package] for f in hosts.facts}
            if len(found) > 1:
                notes.append(f"{package} differs between the hosts, so a run would be refused.")
    if plan.stage > 1:
        notes.append(
            f"DeepSpeed alone hides part of ZeRO stage {plan.stage}'s traffic behind the "
            "computation. Its dense step is an upper bound here."
        )
    if plan.block.prune == "gradient":
        notes.append("The codec was measured on updates; that of gradients takes about as long.")
        notes.append("The losses are those of islands; pruned gradients lose more.")
    return notes


def _plan_text(flags: Any, plan: Plan, local: dict[str, Any]) -> str:
    tokens = plan.batch * plan.accumulation * local["tokens"]
    precision = "bf16" if plan.is_bf16 else "fp32"
    return (
        f"{flags.model}, {local['numel']:,} parameters, {precision}, {tokens:,} tokens a step and "
        f"rank, ZeRO stage {plan.stage}"
    )


def _teller(is_quiet: bool) -> Callable[[str], object]:
    if is_quiet:
        return lambda text: None
    return lambda text: print(f"[doctor] {text}", file=sys.stderr, flush=True)
