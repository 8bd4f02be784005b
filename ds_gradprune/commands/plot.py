"""`ds-gradprune plot`: the picture of one or several runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ds_gradprune.commands import pictures
from ds_gradprune.commands.flags import Parser
from ds_gradprune.commands.runlog import Run, read_run


def parser() -> Parser:
    """The flags."""
    flags = Parser(
        "plot",
        "Draw runs: loss against steps and seconds, density, link rate, where the time goes.",
    )
    flags.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, or a log")
    flags.add_argument("--out", type=Path, help="PNG file (default: plot.png in the first run)")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Raises:
        GradPruneError: a run cannot be read, or the picture cannot be written.
    """
    flags = parser().parse_args(arguments)
    runs = named([read_run(path) for path in flags.runs], flags.runs)
    first: Path = flags.runs[0]
    out = flags.out or (first if first.is_dir() else first.parent) / "plot.png"
    pictures.save(runs, out)
    print(out)
    return 0


def named(runs: Sequence[Run], paths: Sequence[Path]) -> list[Run]:
    """The runs, with the folder above in the name where two have one name."""
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=f"{path.resolve().parent.name}/{run.name}")
        if names.count(run.name) > 1
        else run
        for run, path in zip(runs, paths, strict=True)
    ]
