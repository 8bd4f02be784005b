"""What doctor prints, in the style of ds_report. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ds_gradprune.commands import loss_gap
from ds_gradprune.commands.diagnosis import Column, Diagnosis, Outlook
from ds_gradprune.commands.forecast import exchange_bytes
from ds_gradprune.commands.pairs import Pair
from ds_gradprune.law.verdict import PAYS

WIDTH = 78
RULE = "-" * WIDTH


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that is told.

    Attributes:
        diagnosis: what follows.
        facts: of every host.
        pairs: measured links.
        local: what the first host measured.
        plan_text: what is trained.
        warmup_steps: dense steps before the first pruned one.
        block_warmup_steps: the key of the user's block.
        notes: what the user should know besides.
        doubts: why measured times may not be those of a run.
    """

    diagnosis: Diagnosis
    facts: Sequence[dict[str, Any]]
    pairs: Sequence[Pair]
    local: dict[str, Any]
    plan_text: str
    warmup_steps: int
    block_warmup_steps: int
    notes: Sequence[str]
    doubts: Sequence[str] = ()


def page(found: Findings) -> str:
    """The whole page."""
    parts = [
        *_head("ds_gradprune doctor"),
        *_hosts(found.facts),
        *_kernels(found.local),
        *_links(found.pairs),
        *_step(found),
        *_table(found.diagnosis),
        *_gaps(found.diagnosis),
        *(line for note in found.notes for line in _wrapped(f"note: {note}")),
        *_verdict(found),
    ]
    return "\n".join(parts)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, last_is_text: bool = False
) -> list[str]:
    """Aligned columns: the first to the left, all others to the right, the last one as said."""
    everything = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in everything) for i in range(len(head))]
    lines = []
    for row in everything:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        if last_is_text:
            cells[-1] = row[-1]
        lines.append("  ".join(cells).rstrip())
    return lines


def _head(title: str) -> list[str]:
    return [RULE, title, RULE]


def _hosts(facts: Sequence[dict[str, Any]]) -> Iterator[str]:
    for mine in facts:
        versions = ", ".join(
            f"{name} {version or '(none)'}" for name, version in mine["versions"].items()
        )
        is_same = mine["versions"] == facts[0]["versions"]
        name = f"{mine['host']} ".ljust(20, ".")
        mark = "[OKAY]" if is_same else "[DIFFERS]"
        text = f"{name} {mark} {versions}, {many(mine['cores'], 'core')}, load {mine['load']:.1f}"
        yield from _wrapped(text, indent=27)


def _kernels(local: dict[str, Any]) -> Iterator[str]:
    if local["has_kernels"]:
        yield "native kernels ..... [OKAY]"
    else:
        yield "native kernels ..... [NO] no C++ compiler: the codec takes several times as long"


def _links(pairs: Sequence[Pair]) -> Iterator[str]:
    if not pairs:
        return
    yield from ["", *_head("links, Mbit/s of payload over TCP")]
    rows = [
        [
            f"{p.here} - {p.there}",
            f"{1e3 * p.latency_s:.2f} ms",
            f"{p.to_mbit:.4g}",
            f"{p.from_mbit:.4g}",
            f"{p.many_mbit:.4g}",
            f"{p.both_mbit:.4g}",
        ]
        for p in pairs
    ]
    yield from table(["", "latency", "->", "<-", "4 connections", "both at once"], rows)


def _step(found: Findings) -> Iterator[str]:
    job, local = found.diagnosis.job, found.local
    yield from ["", *_head("the step")]
    yield from _wrapped(found.plan_text)
    if local["step"] is None:
        yield f"computation ........ {seconds(job.compute_s)}, as you say"
    else:
        device = "GPU" if local["device"] == "cuda" else f"CPU, {many(local['threads'], 'thread')}"
        yield f"computation ........ {seconds(job.compute_s)} ({device}; slowest host)"
        yield (
            f"every step besides . {seconds(job.watch_s)} of the plug-in, {seconds(job.wait_s)} "
            "for the last host"
        )
    outlook = found.diagnosis.main
    codecs = [
        f"{seconds(cost.local_s - job.compute_s - job.watch_s)} at {100 * s.density:g} %"
        for s, cost in outlook.pruned.items()
        if s.interval == 1
    ]
    yield f"codec .............. {', '.join(codecs)}"
    links = [o.column for o in found.diagnosis.outlooks]
    if any(row["emulated_s"] for row in local["exchanges"]):
        yield from _emulation(local, links, min(job.islands, 8))


def _emulation(local: dict[str, Any], columns: Sequence[Column], islands: int) -> Iterator[str]:
    """An exchange over the product's emulated link beside its forecast."""
    row = next(r for r in local["exchanges"] if r["emulated_s"])
    wire_bytes = exchange_bytes(row["sample_bytes"], islands)
    forecasts = [2 * c.link.gather_call_s + 8e-6 * wire_bytes / c.rate_mbit for c in columns]
    texts = [
        f"{seconds(real)} ({seconds(forecast)} forecast) at {column.label}"
        for real, forecast, column in zip(row["emulated_s"], forecasts, columns, strict=True)
    ]
    yield from _wrapped(
        f"emulated exchange .. {100 * row['density']:g} %: {', '.join(texts)}", indent=21
    )


def _table(found: Diagnosis) -> Iterator[str]:
    yield from ["", *_head(f"seconds a step, {found.job.islands} hosts (times as fast as dense)")]
    outlooks = found.outlooks
    head = ["", *(_link_name(o) for o in outlooks), "break-even", "loss, %"]
    rows = [["dense", *(seconds(o.dense_s) for o in outlooks), "", ""]]
    for setting in outlooks[0].pruned:
        cells = [
            f"{seconds(o.pruned_s(setting))} ({o.dense_s / o.pruned_s(setting):.2f}x)"
            + ("*" if setting == o.recommended else " ")
            for o in outlooks
        ]
        edge = outlooks[0].break_even_mbit(setting)
        rows.append([setting.name, *cells, rate(edge), found.gap(setting).text])
    yield from table(head, rows)
    yield from _wrapped(
        "* recommended for that link. Break-even: below this link rate, in Mbit/s of payload, the "
        "setting is faster than dense. Loss: expected gap of the final validation loss to dense "
        "training after equally many steps, and one standard deviation of it."
    )


def _gaps(found: Diagnosis) -> Iterator[str]:
    """Where the expected losses come from."""
    job = found.job
    nearest = loss_gap.nearest_measured(found.main.best, job.islands, job.numel)
    yield from _wrapped(
        f"loss: a power law through {len(loss_gap.TABLE)} simulated cases, one of them "
        f"fine-tuning, for {job.islands} islands, {job.numel / 1e6:.2g}M parameters and "
        f"{job.tokens:,} tokens a step and island. Nearest of them: "
        f"{loss_gap.source_text(nearest)}"
    )


def _verdict(found: Findings) -> Iterator[str]:
    diagnosis = found.diagnosis
    yield from ["", *_head("verdict")]
    for doubt in found.doubts:
        yield from _wrapped(f"DOUBTFUL: {doubt}")
    for outlook in diagnosis.outlooks:
        yield from _wrapped(verdict_text(outlook))
    block = json.dumps(diagnosis.block(found.block_warmup_steps), indent=2)
    if not diagnosis.pays:
        yield from _wrapped("Do not use it here. For ds_config.json:")
        yield block
        return
    main = diagnosis.main
    where = "this link" if main.column.is_measured else main.column.label
    yield f"For ds_config.json, on {where}:"
    yield block
    if found.warmup_steps:
        lasts_s = found.warmup_steps * main.dense_s
        yield from _wrapped(
            f"The first {found.warmup_steps} steps are dense and take {duration(lasts_s)} on this "
            f'link ({main.column.label}). "warmup": "unpruned" avoids them.'
        )


def verdict_text(outlook: Outlook) -> str:
    """One sentence on one link."""
    best, column = outlook.best, outlook.column
    where = "This link" if column.is_measured else f"On {column.label}"
    faster = outlook.dense_s / outlook.pruned_s(best)
    edge_mbit = outlook.break_even_mbit(best)
    edge = "at any rate" if edge_mbit is None else f"{rate(edge_mbit)} Mbit/s"
    facts = (
        f"dense {seconds(outlook.dense_s)} a step, pruned {seconds(outlook.pruned_s(best))} with "
        f"{best.name}, break-even {edge}"
    )
    if column.is_measured:
        where = f"{where} carries {column.rate_mbit:.4g} Mbit/s"
    if outlook.recommended is not None:
        return f"{where}: it pays, {faster:.2f} times as fast. {facts[0].upper()}{facts[1:]}."
    if faster > 1.0:
        return (
            f"{where}: it hardly pays. A step must take at most {PAYS:g} of a dense one, because "
            f"the same loss takes more steps. {facts[0].upper()}{facts[1:]}."
        )
    return f"{where}: it does not pay. {facts[0].upper()}{facts[1:]}."


# ---- words ---------------------------------------------------------------------------------------


def many(number: int, word: str) -> str:
    """A number of things."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def seconds(value: float) -> str:
    """A time for a user: three digits."""
    return f"{1e3 * value:.3g} ms" if value < 0.1 else f"{value:.3g} s"


def duration(value: float) -> str:
    """A long time for a user."""
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def rate(mbit: float | None) -> str:
    """A break-even rate for a user."""
    if mbit is None:
        return "any"
    if mbit == 0.0:
        return "none"
    return f"{mbit:.3g}" if mbit < 1000 else f"{float(f'{mbit:.3g}'):,.0f}"


def _link_name(outlook: Outlook) -> str:
    column = outlook.column
    return f"{column.rate_mbit:.4g} measured" if column.is_measured else column.label


def _wrapped(text: str, indent: int = 2) -> Iterator[str]:
    """Lines of at most WIDTH characters, the later ones indented."""
    line = ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > WIDTH:
            yield line
            line = " " * indent + word
        else:
            line = f"{line} {word}" if line else word
    yield line
