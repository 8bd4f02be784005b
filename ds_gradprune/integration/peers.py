"""Before the first step: are all hosts running the same thing?"""

from __future__ import annotations

import platform
import socket
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

import ds_gradprune
from ds_gradprune.codec.base import VERSION as WIRE_FORMAT
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import RankMismatchError


def check_peers(group: Any, config: GradientPruningConfig) -> None:
    """Compare versions and configuration over all ranks.

    `log_path` may differ: only rank 0 uses it.

    Raises:
        RankMismatchError: names what differs and on which hosts, on all ranks alike.

    Collective: all ranks of `group`.
    """
    own = {
        "ds_gradprune": ds_gradprune.__version__,
        "wire format": WIRE_FORMAT,
        "deepspeed": deepspeed.__version__,
        "torch": torch.__version__.split("+")[0],
        "numpy": np.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "gradient_pruning": config.model_copy(update={"log_path": None}).model_dump_json(),
    }
    ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(ranks, (socket.gethostname(), own), group=group)
    differing = [key for key in own if len({facts[key] for _, facts in ranks}) > 1]
    if differing:
        listed = "; ".join(
            f"rank {rank} on {host}: " + ", ".join(f"{key} {facts[key]}" for key in differing)
            for rank, (host, facts) in enumerate(ranks)
        )
        raise RankMismatchError(
            f"all hosts must run the same versions and configuration, but {listed}. Install the "
            "same constraints.txt and copy the same ds_config.json to every host."
        )
