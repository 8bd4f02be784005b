"""The three ways in: `initialize`, `register`, `attach` (engine.py)."""

from __future__ import annotations

import inspect
from typing import Any

import deepspeed
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

from ds_gradprune.config import load_block
from ds_gradprune.errors import ConfigError, UnsupportedError
from ds_gradprune.integration.engine import attach

_original = deepspeed.initialize


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` with pruned gradients: same arguments, same return.

    The block is validated before DeepSpeed opens anything.

    Returns:
        engine, optimizer, training_dataloader, lr_scheduler; `engine.gradprune` is the handle.

    Raises:
        ConfigError, UnsupportedError, RankMismatchError: see `attach`.

    Collective: all ranks.
    """
    load_block(_ds_config(args, kwargs))
    result: tuple[Any, Any, Any, Any] = _original(*args, **kwargs)
    if getattr(result[0], "gradprune", None) is None:
        attach(result[0])
    return result


def register() -> None:
    """Make `deepspeed.initialize` itself prune, for code that calls it (HF Trainer, Accelerate).

    Twice is fine. Local.
    """
    deepspeed.initialize = initialize


def unregister() -> None:
    """Undo `register`. Local."""
    if deepspeed.initialize is not initialize and deepspeed.initialize is not _original:
        raise UnsupportedError("deepspeed.initialize was replaced after register; undo that first")
    deepspeed.initialize = _original


def _ds_config(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The configuration in whichever of its four places deepspeed.initialize would find it."""
    given = inspect.signature(_original).bind(*args, **kwargs).arguments
    in_args = getattr(given.get("args"), "deepspeed_config", None)
    config = given.get("config") or given.get("config_params") or in_args
    if config is None:
        raise ConfigError("deepspeed.initialize must be given config (a path or a dict), got none.")
    try:
        parsed: dict[str, Any] = load_ds_config(config)
    except ValueError as exc:
        raise ConfigError(f"the DeepSpeed configuration cannot be read: {exc}") from exc
    return parsed
