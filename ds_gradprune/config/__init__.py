"""The `gradient_pruning` block of ds_config.json: what it may hold, and what is wrong with it.

`fields` holds ranges, `model` the keys, `rules` what must fit together, `wording` the sentences,
`load` the way from a file to a checked block. Nothing here knows DeepSpeed.
"""

from ds_gradprune.config.fields import FIRST_INTERVAL, INTERVALS
from ds_gradprune.config.load import load_block, read_config
from ds_gradprune.config.model import (
    BLOCK,
    DensityConfig,
    GradientPruningConfig,
    IslandConfig,
    LinkPoint,
    TargetPoint,
    ThrottleConfig,
)

__all__ = [
    "BLOCK",
    "FIRST_INTERVAL",
    "INTERVALS",
    "DensityConfig",
    "GradientPruningConfig",
    "IslandConfig",
    "LinkPoint",
    "TargetPoint",
    "ThrottleConfig",
    "load_block",
    "read_config",
]
