"""Per-rank pruning state beside DeepSpeed's checkpoint files.

DeepSpeed lets rank 0 alone save `client_state`, but every rank owes something else (its residual)
and draws other random numbers. So each rank writes one file of its own into the tag folder, before
DeepSpeed writes its files and, last, `latest`: a run killed in between resumes from the checkpoint
before.
"""

from __future__ import annotations

import glob
import logging
import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ds_gradprune.errors import CheckpointError

logger = logging.getLogger(__name__)

_PLAIN = (bool, int, float, str, type(None))

_STEM = "gradient_pruning_rank_"


def state_path(folder: str, tag: str, rank: int, world_size: int) -> str:
    """The file of one rank."""
    return os.path.join(folder, tag, f"{_STEM}{rank:05d}_of_{world_size:05d}.pt")


def latest_tag(folder: str) -> str | None:
    """The tag that DeepSpeed's `latest` file names; None if there is no such file."""
    path = os.path.join(folder, "latest")
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def save(path: str, state: Mapping[str, Any]) -> None:
    """Write one rank's state, whole or not at all. Local.

    Raises:
        CheckpointError: the state holds what `load` would not read again.
    """
    _check_plain(state, "state")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = path + ".tmp"
    torch.save({"pruning": dict(state), "random": random_state()}, temporary)
    os.replace(temporary, path)


def load(folder: str, tag: str, rank: int, world_size: int, group: Any) -> dict[str, Any] | None:
    """Read this rank's file, if every rank can read its own.

    Returns:
        What `save` wrote, or None if this is a checkpoint of a run without pruning.

    Raises:
        CheckpointError: on all ranks alike, if some rank's file is missing or damaged, or if the
            files are of another world size.

    Collective: all ranks of `group`.
    """
    path = state_path(folder, tag, rank, world_size)
    state, fault = _read(path)
    found = glob.glob(os.path.join(glob.escape(os.path.join(folder, tag)), _STEM + "*.pt"))
    answers: list[Any] = [None] * world_size
    dist.all_gather_object(answers, (fault, len(found)), group=group)
    if all(count == 0 for _, count in answers):
        logger.warning(
            "checkpoint %s holds no pruning state: a run without gradient pruning saved it. The "
            "residual starts at zero and the controller with its warm-up.",
            os.path.join(folder, tag),
        )
        return None
    faults = [f"rank {r}: {answer[0]}" for r, answer in enumerate(answers) if answer[0]]
    if faults:
        raise CheckpointError(
            f"checkpoint {os.path.join(folder, tag)} cannot be resumed with {world_size} ranks: "
            + "; ".join(faults)
            + ". Resume with the world size that saved it, from a folder every rank can read."
        )
    return state


def random_state() -> dict[str, Any]:
    """The states of all random generators of this process, as plain types and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Continue every random generator where `random_state` saw it. Local."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _check_plain(value: Any, path: str) -> None:
    """Only what torch.load reads with weights_only: a scheduler's state may hold anything."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_plain(inner, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check_plain(inner, f"{path}[{index}]")
    elif not isinstance(value, torch.Tensor) and type(value) not in _PLAIN:
        raise CheckpointError(
            f"{path} must be a number, a text, a tensor, or a list or dict of those to be saved, "
            f"got {type(value).__name__}."
        )


def _read(path: str) -> tuple[dict[str, Any] | None, str | None]:
    if not os.path.isfile(path):
        return None, f"{os.path.basename(path)} is missing"
    try:
        return torch.load(path, map_location="cpu", weights_only=True), None
    except Exception as exc:  # whatever a damaged file raises, all ranks must hear of it
        return None, f"{os.path.basename(path)} is damaged ({type(exc).__name__})"
