"""Deletes old state files on hosts where nobody else does.

The Hugging Face Trainer rotates its checkpoints (`save_total_limit`) on rank 0's host. On every
other host without a shared disk our files, and the Trainer's random states, would stay for ever: 12
bytes per parameter and save.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Collection

from ds_gradprune.deepspeed.agree import gather_texts
from ds_gradprune.deepspeed.checkpoint import FILE_NAME, Seat
from ds_gradprune.deepspeed.disks import DEEPSPEED, OWN_DISK

logger = logging.getLogger(__name__)

_RANDOM_STATES = re.compile(r"rng_state(_\d+)?\.pth|random_states_\d+\.pkl")
"""What the Trainer and Accelerate leave on every host."""


def rotate(save_dir: str, seat: Seat) -> list[str]:
    """`drop_orphans` of what rank 0's host no longer has; for the Trainer's `on_save`.

    Returns:
        Names of the folders that were deleted on this host.

    Collective: all ranks of the seat's transport.
    """
    mine = _listed(save_dir) if seat.is_first else []
    kept = json.loads(gather_texts(seat.transport, json.dumps(mine))[0])
    return drop_orphans(save_dir, kept)


def drop_orphans(save_dir: str, keep: Collection[str]) -> list[str]:
    """Delete checkpoints of which this host has nothing but our files. Local.

    A folder goes if it holds at least one state file of ours and, besides, only random states and
    empty folders; where it is marked as of a disk that is not rank 0's, DeepSpeed's files, too. So
    a folder with anything of the user's stays.

    Args:
        save_dir: what holds the checkpoints, the Trainer's `output_dir`.
        keep: names of the folders in it that rank 0 still has; empty: nothing is deleted.

    Returns:
        Names of the folders that were deleted. What cannot be deleted is warned of.
    """
    dropped: list[str] = []
    for name in _listed(save_dir) if keep else []:
        folder = os.path.join(save_dir, name)
        if name in keep or os.path.islink(folder) or not _is_orphan(folder):
            continue
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue  # a shared disk: rank 0 was faster
        except OSError as exc:
            logger.warning("%s is left over and cannot be deleted: %s", folder, exc)
            continue
        dropped.append(name)
    if dropped:
        logger.info("deleted %s, which rank 0 has deleted as well", ", ".join(dropped))
    return dropped


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _is_orphan(folder: str) -> bool:
    ours, is_own_disk, theirs = 0, False, 0
    for parent, folders, names in os.walk(folder):
        if any(os.path.islink(os.path.join(parent, name)) for name in (*folders, *names)):
            return False
        for name in names:
            if FILE_NAME.fullmatch(name.removesuffix(".tmp")):
                ours += 1
            elif name == OWN_DISK:
                is_own_disk = True
            elif DEEPSPEED.fullmatch(name):
                theirs += 1
            elif not _RANDOM_STATES.fullmatch(name):
                return False
    return ours > 0 and (is_own_disk or not theirs)
