"""Command lines whose faults are told like all others: one message, exit code 2."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn

from ds_gradprune.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises where argparse would print and exit.

    Flags cannot be abbreviated: what a script line means must not change when a flag is added.

    Args:
        command: of `ds-gradprune`; None: a script.
        description: see argparse.
        epilog: see argparse.
    """

    def __init__(self, command: str | None, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=None if command is None else f"ds-gradprune {command}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
        )
        self._help = "--help" if command is None else f"{self.prog} --help"

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message}. See {self._help}.")


def above_zero(text: str) -> float:
    """A number above 0, for argparse's `type`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0.0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def not_negative(text: str) -> float:
    """A number from 0 on, for argparse's `type`."""
    return 0.0 if text.strip() in ("0", "0.0") else above_zero(text)


def numbers(text: str) -> tuple[float, ...]:
    """Numbers above 0 with commas between them, without repetition, rising."""
    return tuple(sorted({above_zero(part) for part in text.split(",")}))


def several(text: str) -> int:
    """A whole number from 2 on, for argparse's `type`."""
    return _at_least(2, text)


def count(text: str) -> int:
    """A whole number from 1 on, for argparse's `type`."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """A whole number from 0 on, for argparse's `type`."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text!r}")
    return int(text)
