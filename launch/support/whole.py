"""Which checkpoint of a run is whole: every file in it is read against the checksums inside it.

All functions are local: files of hosts that share no disk with this one are checked there, when
they are loaded. Torch is not needed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from ds_gradprune.deepspeed.zipped import zip_fault

from .run_folder import write_text

_TAG = re.compile(r"[^0-9]*([0-9]+)")


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with the first damaged file of a checkpoint; None: nothing."""
    files = sorted(checkpoint.rglob("*.pt"))
    if not files:
        return f"{checkpoint} holds no file of a checkpoint"
    return next((fault for path in files if (fault := zip_fault(path)) is not None), None)


def candidates(checkpoints: Path) -> Iterator[str]:
    """The tag that the file `latest` names, then those of earlier steps, the newest first."""
    latest = ""
    with contextlib.suppress(OSError, ValueError):
        latest = (checkpoints / "latest").read_text(encoding="utf-8").strip()
    if not latest:
        return
    yield latest
    steps, named = tags_in(checkpoints), step_of(latest)
    for step in sorted(steps, reverse=True):
        if named is None or step < named:
            yield steps[step]


def tags_in(checkpoints: Path) -> dict[int, str]:
    """Step -> tag of every checkpoint that has a folder."""
    steps = {}
    with contextlib.suppress(OSError):
        for folder in checkpoints.iterdir():
            step = step_of(folder.name)
            if step is not None and folder.is_dir() and not folder.is_symlink():
                steps[step] = folder.name
    return steps


def step_of(tag: str) -> int | None:
    """The step that a tag names; None: it names none. Pure."""
    found = _TAG.fullmatch(tag)
    return int(found[1]) if found else None


def name_latest(checkpoints: Path, tag: str) -> None:
    """Make a checkpoint the one that DeepSpeed loads.

    Raises:
        DataError: the disk refuses.
    """
    write_text(checkpoints / "latest", tag)
