"""Command lines of scripts: those of `ds-gradprune`, and flags that name files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ds_gradprune.commands.flags import Parser, natural
from ds_gradprune.commands.flags import count as positive
from ds_gradprune.config import BLOCK

__all__ = [
    "ScriptParser",
    "add_run_flags",
    "given_flags",
    "name_or_path",
    "natural",
    "path",
    "positive",
]


class ScriptParser(Parser):
    """A parser of a script."""

    def __init__(self, description: str) -> None:
        super().__init__(None, description)


def add_run_flags(flags: ScriptParser, config: Path, *, steps: int, out: str, seed: str) -> None:
    """Add what both training scripts take.

    Args:
        flags: of the script.
        config: DeepSpeed's, where none is given.
        steps: likewise.
        out: name of the run folder below runs/, likewise.
        seed: what it decides.
    """
    add = flags.add_argument
    add(
        "--config",
        type=path,
        default=config,
        help=f"DeepSpeed's JSON file, with a {BLOCK} block (default: ds_configs/{config.name})",
    )
    add("--steps", type=positive, default=steps, help=f"optimizer steps in all (default: {steps})")
    folder = f"runs/{out}"
    add("--out", type=path, default=Path(folder), help=f"run folder (default: {folder})")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--seed", type=natural, default=0, help=f"{seed} (default: 0)")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed passes it


def path(text: str) -> Path:
    """A path that the system can look up, whether or not it is there; for argparse's `type`."""
    try:
        os.lstat(text)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # whoever opens it says what is wrong
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise argparse.ArgumentTypeError(f"must be a path, got {text[:40]!r}...: {reason}") from exc
    return Path(text)


def name_or_path(text: str) -> str:
    """A name that may also be a path, unchanged; for argparse's `type`."""
    path(text)
    return text


def given_flags(flags: argparse.Namespace, unlisted: Collection[str]) -> dict[str, Any]:
    """Flag -> value, as plain JSON, without those in `unlisted` (attribute names). Pure."""
    return {
        f"--{name.replace('_', '-')}": str(value) if isinstance(value, Path) else value
        for name, value in vars(flags).items()
        if name not in unlisted
    }
