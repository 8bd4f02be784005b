"""What a run of islands says when it starts: how often they exchange, and by which factor."""

from __future__ import annotations

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.train.outer import update_scale
from ds_gradprune.train.scale import words_of_scale


def opening(config: GradientPruningConfig, num_islands: int) -> str:
    """One line for a user. Local.

    Args:
        config: the validated block.
        num_islands: how many there are.
    """
    often = "after every step" if config.sync_every == 1 else f"every {config.sync_every} steps"
    if config.sync_every == "auto":
        often = "as often as the law says"
    setting = config.update_scale
    factor = words_of_scale(setting, config.residual_form, update_scale(num_islands, setting))
    how = "hidden behind the next steps" if config.delay_steps else "waited for"
    return f"{num_islands} islands exchange updates {often}, {how}; update_scale is {factor}"
