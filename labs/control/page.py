"""The tables for the screen and the page, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labs.control.plant import BUDGET_S
from labs.control.score import Course
from labs.race.plots import load_pyplot

COLUMNS = (
    ("settle_down_p95", "settle down", ".0f"),
    ("settle_up_p95", "settle up", ".0f"),
    ("late_down_p95", "late down", ".0f"),
    ("in_budget", "in budget", ".1%"),
    ("density_vs_oracle", "density / oracle", ".3f"),
    ("density_vs_fill", "density / exact fill", ".3f"),
    ("stationary_changes", "stationary changes", ".0f"),
    ("false_miss", "false P missed", ".2%"),
    ("update_us", "update us", ".1f"),
)
LINK_COLUMNS = tuple(column for column in COLUMNS if column[0] not in ("false_miss", "update_us"))
LOSS_COLUMNS = (
    ("miss_share", "P called missed", ".2%"),
    ("answered_within_max", "answered within", ".0f"),
    ("unanswered", "unanswered", ".0f"),
    ("end_density_vs_oracle_max", "density at the end / oracle", ".2f"),
    ("over_budget_density_share", "steps above 1.25 oracle", ".1%"),
)

NOTE = (
    "Settle: steps from the first at a new rate to the first from which the median of five step "
    "times is at most 1.02 of the budget and the density at least 0.6 of the oracle's, 95th "
    "percentile. Late: steps over budget among the first 20 after a fall, 95th percentile; this "
    "one forgives nothing. In budget: of the steps that the oracle met. The oracle knows every "
    "rate beforehand, not a step's chance, and leaves two standard deviations; exact fill leaves "
    "none. Stationary changes: the most in the last 1,000 steps of a run. Update: processor time, "
    "median over runs. Answered within: steps from the start of a rise to the first answer, most."
)


def rows_of(
    parts: dict[str, dict[str, Any]], columns: Sequence[tuple[str, str, str]], first: str
) -> list[list[str]]:
    """A head and one row for each part."""
    rows = [[first, *(head for _, head, _ in columns)]]
    for name, figures in parts.items():
        cells = [_cell(figures[key], form) for key, _, form in columns]
        rows.append([name, *cells])
    return rows


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """For the screen."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """For the page."""
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables_of(laws: dict[str, Any]) -> list[str]:
    """The tables of the simulator's page, in Markdown: all laws, ours by link, losses."""
    name = "predictive" if "predictive" in laws else next(iter(laws))
    by_loss = {
        f"{law}, {kind}": figures
        for law in laws
        if laws[law]["false_miss"] is not None
        for kind, figures in laws[law]["losses"].items()
    }
    return [
        markdown_table(rows_of(laws, COLUMNS, "law")),
        NOTE,
        f"## {name}, link by link",
        markdown_table(rows_of(laws[name]["links"], LINK_COLUMNS, "link")),
        "## Losses, on an unchanged link",
        markdown_table(rows_of(by_loss, LOSS_COLUMNS, "law and loss")),
    ]


def write(
    out: Path,
    title: str,
    about: dict[str, Any],
    facts: Sequence[str],
    parts: Sequence[str],
    pictures: Sequence[Path],
) -> None:
    """The page beside a JSON file.

    Args:
        out: the JSON file.
        title: of the page.
        about: what `setting` says of the run.
        facts: one line each, after those of the setting.
        parts: tables and text, in Markdown.
        pictures: beside the JSON file.
    """
    machine = about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = ", ".join(f"{x:.1f}" for x in machine["load_average"])
    lines = [
        f"command: `{about['command']}`",
        f"commit {about['commit']}, {about['date']}",
        f"{machine['cpu']}, {machine['cores']} cores; Linux {machine['kernel']}, Python "
        f"{machine['python']}, {versions}; load average at the start: {load}",
        *facts,
    ]
    whole = [f"# {title}", "\n".join(f"- {line}" for line in lines), *parts]
    whole += [f"![{path.stem}]({path.name})" for path in pictures]
    out.with_suffix(".md").write_text("\n\n".join(whole) + "\n", encoding="utf-8")


def draw(courses: Sequence[Course], path: Path) -> None:
    """Density and step time of several laws on one link; the oracle, which comes first, dashed."""
    pyplot = load_pyplot()
    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 6))
    for number, course in enumerate(courses):
        style: dict[str, Any] = {"lw": 1.2, "label": course.law}
        if number == 0:
            style |= {"color": "black", "ls": "--", "lw": 0.8}
        upper.plot(course.densities, **style)
        if number:
            lower.plot(course.step_s, lw=0.7, label=course.law)
    upper.set_yscale("log")
    upper.set_ylabel("density")
    upper.legend(fontsize=8)
    lower.axhline(BUDGET_S, color="black", lw=0.8)
    lower.set_ylim(0.5, 2.0)
    lower.set_ylabel("step time, s")
    lower.set_xlabel(f"step; link {courses[0].trace}, {courses[0].hosts} hosts")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
