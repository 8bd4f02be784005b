"""What the user asked for: the flags of launch/train.py and the DeepSpeed configuration."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_gradprune.commands.dispatch import SHIPPED
from ds_gradprune.config import BLOCK, GradientPruningConfig, load_block
from ds_gradprune.errors import ConfigError
from textgen.corpus import open_text

from .flags import ScriptParser, add_run_flags, given_flags, name_or_path, path, positive
from .run_folder import RunFolder
from .start import read_ds_config

OWN_TEXT = SHIPPED / "own_text.json"
"""DeepSpeed's configuration where none is given."""

SHARES = {"warmup_steps": (0, 8), "ramp_steps": (0, 8), "window_size": (4, 4)}
"""Keys of its block that a short run cannot have as they are: the least value, and a share of the
steps."""


def parser() -> ScriptParser:
    """The flags; all else is a key of the DeepSpeed configuration."""
    flags = ScriptParser("Train a text generator over pruned updates or gradients.")
    add = flags.add_argument
    add_run_flags(flags, OWN_TEXT, steps=1000, out="train", seed="weights and order")
    add(
        "--model",
        type=name_or_path,
        default="nano",
        help="nano (1M parameters), micro (10M) or small (124M), trained from nothing; or a "
        "transformers folder or hub name, trained on (default: nano)",
    )
    add(
        "--text",
        type=path,
        help="UTF-8 file, or folder of text files (default: the help topics and docstrings of this "
        "Python)",
    )
    add("--eval-every", type=positive, default=100, help="steps between validations (default: 100)")
    add("--save-every", type=positive, default=500, help="steps between checkpoints (default: 500)")
    return flags


@dataclass(frozen=True)
class RunSettings:
    """What the user of either script asked for, checked as far as no peer is needed."""

    flags: argparse.Namespace
    ds_config: dict[str, Any]
    block: GradientPruningConfig
    folder: RunFolder

    def facts(self) -> dict[str, Any]:
        """What must be equal on all ranks, as plain JSON. Pure."""
        # Of files the content is compared, not the path.
        flags = given_flags(self.flags, ("config", "text", "data", "prompts", "local_rank"))
        return flags | self.ds_config | {BLOCK: self.block.model_dump(mode="json")}


@dataclass(frozen=True)
class Settings(RunSettings):
    """What the user of launch/train.py asked for.

    Attributes:
        note: what was fitted to a short run; empty: nothing.
    """

    note: str = ""

    def check_inputs(self, *, comes_back: bool = False) -> str:
        """Check text, model name and run folder; reads the text once. Local, writes nothing.

        Args:
            comes_back: the run goes on in that folder, and this rank takes part in it again.

        Returns:
            What tells one text from another.

        Raises:
            ConfigError, DataError: one of them cannot be used.
        """
        if not (self.flags.resume or comes_back):
            self.folder.check_new()
        from textgen.model import check_model_name, quiet_transformers

        quiet_transformers()
        check_model_name(self.flags.model)
        if self.flags.text is None:
            return f"the embedded text of Python {platform.python_version()}"
        return open_text(self.flags.text).check()


def read_settings(arguments: Sequence[str] | None) -> Settings:
    """Parse flags and configuration. Local.

    Raises:
        ConfigError: something is wrong.
    """
    flags = parser().parse_args(arguments)
    ds_config = read_ds_config(flags.config)
    note = fit(ds_config, flags.steps) if flags.config == OWN_TEXT else ""
    block = load_block(ds_config, flags.steps)
    if "optimizer" not in ds_config:
        raise ConfigError("optimizer must be present in the DeepSpeed configuration.")
    return Settings(flags, ds_config, block, RunFolder(flags.out), note)


def fit(ds_config: dict[str, Any], steps: int) -> str:
    """Shorten what the configuration that nobody has chosen has for longer runs. Pure.

    Args:
        ds_config: changed.
        steps: of the run.

    Returns:
        What was changed, for the user; empty: nothing.
    """
    block, changed = ds_config[BLOCK], []
    for key, (least, share) in SHARES.items():
        if block[key] > max(least, steps // share):
            block[key] = max(least, steps // share)
            changed.append(f"{key} {block[key]}")
    return f"note: for {steps} steps it takes {', '.join(changed)}" if changed else ""
