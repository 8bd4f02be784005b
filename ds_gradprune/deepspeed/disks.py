"""Hosts with disks of their own: one island on every disk writes DeepSpeed's files.

DeepSpeed writes what is equal on all ranks once, on rank 0's disk, and names the newest checkpoint
there alone. A rank on another disk could not resume. So each rank finds out, at every save, which
islands it shares a disk with; the first of them writes. On a shared disk that is island 0, as if it
were the whole run. Nothing is guessed from names or settings: files are looked for.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator

from ds_gradprune.deepspeed.agree import gather_texts
from ds_gradprune.deepspeed.checkpoint import Seat, agree_on
from ds_gradprune.errors import CheckpointError

OWN_DISK = "gradient_pruning_own_disk"
"""Marks a tag's folder whose files of DeepSpeed another island than the first has written."""

DEEPSPEED = re.compile(
    r"latest|mp_rank_\d+_model_states\.pt"
    r"|(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_(optim|model)_states\.pt"
)
"""What it has written."""

_WRITER = re.compile(r"inline_container|PytorchStreamWriter|file write failed|enforce fail", re.I)
"""torch.save hides a full disk behind a RuntimeError of its file writer."""


def first_island(folder: str, seat: Seat) -> int:
    """The first island that shares the disk of this rank.

    Args:
        folder: of a tag, the same text on all ranks.
        seat: of this rank.

    Raises:
        CheckpointError: some rank cannot write there; on all ranks alike.

    Collective: all ranks of the seat's transport.
    """
    # A new name every time: a file system in the network may remember what was not there.
    token = gather_texts(seat.transport, secrets.token_hex(8))[0]
    paths = [os.path.join(folder, f".disk_{token}_{i:05d}") for i in range(seat.num_islands)]
    fault: CheckpointError | None = None
    try:
        if seat.shard == 0:
            os.makedirs(folder, exist_ok=True)
            with open(paths[seat.island], "x", encoding="utf-8"):
                pass
    except OSError as exc:
        fault = CheckpointError(
            f"{folder} must be a folder that can be written, got: {exc.strerror}. Save elsewhere."
        )
    agree_on(fault, seat)
    seen = [island for island, path in enumerate(paths) if os.path.exists(path)]
    gather_texts(seat.transport, "")  # all have looked
    if seat.shard == 0:
        os.unlink(paths[seat.island])
    return min(seen, default=seat.island)


def is_refusal(exc: Exception) -> bool:
    """Whether the disk has refused a save: all errors but RuntimeErrors of others. Pure."""
    return not isinstance(exc, RuntimeError) or _WRITER.search(str(exc)) is not None


@contextlib.contextmanager
def told(save_dir: str, tag: str) -> Iterator[None]:
    """What a disk refuses to DeepSpeed, which saves inside, is told by name. Local.

    Raises:
        CheckpointError: instead of an OSError, or of the RuntimeError of torch's file writer.
    """
    try:
        yield
    except (OSError, RuntimeError) as exc:
        if not is_refusal(exc):
            raise
        reason = exc.strerror if isinstance(exc, OSError) else (str(exc).splitlines() or [""])[0]
        free = shutil.disk_usage(save_dir).free / 1e6 if os.path.isdir(save_dir) else 0.0
        raise CheckpointError(
            f"{os.path.join(save_dir, tag)} could not be saved: {reason or type(exc).__name__} "
            f"({free:.0f} MB free). What was saved before is whole. Make room, and save again."
        ) from exc


def name_latest(save_dir: str, tag: str, *, names: bool, marks: bool = True) -> None:
    """Finish a save on this disk. Local.

    Args:
        save_dir: holds the tag's folder.
        tag: of the save, which all ranks have ended.
        names: write `latest`.
        marks: this is not rank 0's disk.

    Raises:
        CheckpointError: it cannot be written.
    """
    latest = os.path.join(save_dir, "latest")
    try:
        if marks:
            with open(os.path.join(save_dir, tag, OWN_DISK), "w", encoding="utf-8"):
                pass
        if names:
            with open(f"{latest}.tmp", "w", encoding="utf-8") as file:
                file.write(tag)
            os.replace(f"{latest}.tmp", latest)
    except OSError as exc:
        raise CheckpointError(f"{latest} cannot be written ({exc.strerror}).") from exc
    finally:
        with contextlib.suppress(OSError):
            os.unlink(f"{latest}.tmp")
