"""Command lines whose faults are told like all others: one message, exit code 2."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn

from ds_gradprune.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises where argparse would print and exit.

    Flags cannot be abbreviated: what a script line means must not change when a flag is added.
    """

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"ds-gradprune {command}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message}. See {self.prog} --help.")


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
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 2, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """A whole number from 1 on, for argparse's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)
