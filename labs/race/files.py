"""What a campaign leaves: JSON, a page, pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labs.race import page, plots
from labs.race.campaign import Plan
from labs.race.figures import Figures, Row
from textgen.data import VALIDATION_WINDOWS


def write(
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
        f"- {machine['cpu']}, {machine['cores']} cores for {flags.hosts} hosts of "
        f"{flags.ranks_per_host} ranks, one thread each; ZeRO stage {recipe['zero_stage']}; "
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
