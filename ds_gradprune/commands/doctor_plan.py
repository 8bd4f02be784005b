"""What the user wants to train, from DeepSpeed's configuration, as far as doctor needs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_gradprune.commands.diagnosis import DENSITIES, INTERVALS
from ds_gradprune.commands.forecast import Setting, settings
from ds_gradprune.config import BLOCK, GradientPruningConfig, load_block, read_config
from ds_gradprune.errors import ConfigError

MICRO_BATCH = 4
"""Sequences of a micro-step where no configuration says."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the user wants to train, as far as it matters here.

    Attributes:
        block: ours.
        batch: sequences of a micro-step.
        accumulation: micro-steps.
        stage: of ZeRO.
        is_bf16: bf16 or fp16 is on.
    """

    block: GradientPruningConfig
    batch: int = MICRO_BATCH
    accumulation: int = 1
    stage: int = 0
    is_bf16: bool = False


def read_plan(path: str | None, batch: int | None = None) -> Plan:
    """The configuration, as far as it matters here.

    Args:
        path: of DeepSpeed's configuration; None: all defaults. It may lack our block.
        batch: overrides its micro-batch.

    Raises:
        ConfigError: it cannot be read, or a value of it cannot be used.
    """
    if path is None:
        return Plan(GradientPruningConfig(), batch or MICRO_BATCH)
    if not Path(path).is_file():
        raise ConfigError(f"--config must be a file, got {path}.")
    config = read_config(path)
    given = config.get(BLOCK)
    block = load_block({**config, BLOCK: given if given is not None else {}})
    if not block.enabled:
        block = GradientPruningConfig()
    return Plan(
        block=block,
        batch=batch or _whole(config, "train_micro_batch_size_per_gpu", MICRO_BATCH),
        accumulation=_whole(config, "gradient_accumulation_steps", 1),
        stage=_whole(config.get("zero_optimization") or {}, "stage", 0),
        is_bf16=any(_is_on(config, name) for name in ("bf16", "bfloat16", "fp16")),
    )


def _whole(config: dict[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    if value == "auto":
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{key} must be a whole number, got {value!r}.")
    return value


def _is_on(config: dict[str, Any], name: str) -> bool:
    block = config.get(name)
    return isinstance(block, dict) and block.get("enabled") is True


def decay_of(interval: int, block: GradientPruningConfig) -> float | None:
    """How the residual is kept with an interval, as in `residual_form`; None: without a buffer."""
    form = block.residual or ("used" if interval == 1 else "reset")
    return block.residual_decay if form == "reset" else None


def settings_of(block: GradientPruningConfig) -> list[Setting]:
    """What is compared: intervals are for updates alone."""
    return settings(DENSITIES, INTERVALS if block.prune == "update" else (1,))
