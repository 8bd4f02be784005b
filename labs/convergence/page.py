"""The results page, in the form that results/README.md asks for."""

from __future__ import annotations

import datetime
import functools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labs.convergence.table import markdown_table
from labs.machine import commit, machine

_REMARKS = "## Remarks"


def environment() -> dict[str, Any]:
    """What the figures hold for."""
    now = datetime.datetime.now(datetime.timezone.utc)
    date = now.strftime("%Y-%m-%d %H:%M UTC")
    return {"commit": commit_of_this(), "date": date, **machine()}


@functools.cache
def commit_of_this() -> str:
    """The commit of the laboratory's code."""
    return commit(Path(__file__).resolve().parents[2])


def write(result: dict[str, Any], path: Path, picture: Path | None, command: Sequence[str]) -> None:
    """Write the page; remarks that an earlier page has are kept.

    Args:
        result: as `command.run_grid` makes it.
        path: the page.
        picture: beside it.
        command: argv without the program; folders are left out.
    """
    where, model, train = result["environment"], result["model"], result["train"]
    words = [Path(word).name if word.startswith("/") else word for word in command]
    missing = result["runs_wanted"] - result["runs"]
    device = "" if result["device"] == "cpu" else f", trained on one {result['device']}"
    lines = [
        f"# {result['question']}",
        "",
        *([f"Not finished: {missing} runs are missing.", ""] if missing else []),
        f"`python -m labs.convergence {shlex.join(words)}`",
        "",
        f"Commit {where['commit']}, {where['date']}; {where['cpu']}, {where['cores']} cores, load "
        f"{where['load_average'][0]:.1f}{device}; Python {where['python']}, torch "
        f"{where['versions']['torch']}. All runs together {result['run_s'] / 60:.0f} minutes, "
        f"{result['cpu_s'] / 60:.0f} of them CPU time of one core.",
        "",
        f"{result['workers']} simulated workers, {result['steps']} steps, of which "
        f"{train['warmup_steps']} dense; GPT of {result['numel']:,} parameters "
        f"({model['n_layer']} layers, width {model['n_embd']}, context {model['context']}, "
        f"{result['text']['vocab_size']} distinct bytes, products of {model['matmul']} factors), "
        f"{train['batch']} sequences per worker "
        f"and step; AdamW, lr {train['lr']:g}, betas {train['beta1']:g} and {train['beta2']:g}, "
        f"weight decay {train['weight_decay']:g}, clipping at {train['clip']:g}. Where a method's "
        "name says so, it and its dense run differ from this.",
        "",
        "Bits: received per parameter and step after warm-up, without announcements of 64 bytes. "
        "Gap: validation loss against dense "
        "with the same hyper-parameters and the same seed: mean, standard deviation over seeds, "
        "and standard error of the mean. "
        "Averaged: the weights' mean over the last 5 % of the steps, against dense's mean. "
        "*: made when the laboratory still simulated the product's methods.",
        "",
        markdown_table(result["rows"]),
        "",
    ]
    if picture is not None:
        lines += [f"![loss gap against bits]({picture.name})", ""]
    path.write_text("\n".join([*lines, remarks(path)]), encoding="utf-8")


def remarks(path: Path) -> str:
    """The end of a page: the remarks that it has, for people to write."""
    own = ""
    if path.is_file():
        own = path.read_text(encoding="utf-8").partition(_REMARKS)[2]
    return f"{_REMARKS}{own}".rstrip() + "\n"
