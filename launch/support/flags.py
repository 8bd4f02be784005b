"""Command lines whose faults are told like all others: one message, from one rank."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from ds_gradprune.errors import ConfigError


class ScriptParser(argparse.ArgumentParser):
    """An argparse parser that raises where argparse would print and exit.

    Flags cannot be abbreviated: what a script line means must not change when a flag is added.
    """

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message}. See --help.")


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse's `type`."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """A whole number from 0 on, for argparse's `type`."""
    return _at_least(0, text)


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


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text!r}")
    return int(text)
