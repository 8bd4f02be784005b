"""Command lines of scripts: those of `ds-gradprune`, and flags that name files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ds_gradprune.commands.flags import Parser, natural
from ds_gradprune.commands.flags import count as positive

__all__ = ["ScriptParser", "given_flags", "name_or_path", "natural", "path", "positive"]


class ScriptParser(Parser):
    """A parser of a script."""

    def __init__(self, description: str) -> None:
        super().__init__(None, description)


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
