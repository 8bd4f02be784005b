"""attach(engine): the checks before anything is hooked, and which handle an engine gets."""

from __future__ import annotations

import logging
from typing import Any

from ds_gradprune.config import load_block
from ds_gradprune.errors import UnsupportedError
from ds_gradprune.integration import seams
from ds_gradprune.integration.handle import Clock, Handle
from ds_gradprune.integration.islands import IslandHandle
from ds_gradprune.integration.peers import check_peers

__all__ = ["Clock", "Handle", "attach"]

logger = logging.getLogger(__name__)


def attach(engine: Any, *, clock: Clock | None = None) -> Handle:
    """Prune what a DeepSpeed engine exchanges, from its next step on.

    Reads the `gradient_pruning` block from the engine's own configuration. With `enabled: false`
    the engine is left alone; with one rank it trains as before and pruning is idle.

    Args:
        engine: what `deepspeed.initialize` returned first.
        clock: where time comes from; for tests.

    Returns:
        The handle, also found as `engine.gradprune`.

    Raises:
        ConfigError: the block is missing or wrong.
        UnsupportedError: the engine uses what pruned gradients cannot serve.
        RankMismatchError: hosts differ in versions or in the block.

    Collective: all ranks.
    """
    if not isinstance(engine.config, dict):
        raise UnsupportedError(f"engine.config must be a dict, got {type(engine.config).__name__}")
    config = load_block(engine.config)
    kind = IslandHandle if config.prune == "update" else Handle
    if config.enabled:
        seams.check(engine, config.prune)
        check_peers(kind.group_of(engine), config)
    handle = kind(engine, config, clock or Clock())
    engine.gradprune = handle
    if handle.idle and config.enabled:
        logger.warning("gradient pruning is idle: there is only one rank, nothing to exchange")
    return handle
