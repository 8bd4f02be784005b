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
    steps = {}
    with contextlib.suppress(OSError):
        for folder in checkpoints.iterdir():
            found = _TAG.fullmatch(folder.name)
            if found and folder.is_dir() and not folder.is_symlink():
                steps[int(found[1])] = folder.name
    named = _TAG.fullmatch(latest)
    for step in sorted(steps, reverse=True):
        if named is None or step < int(named[1]):
            yield steps[step]


def name_latest(checkpoints: Path, tag: str) -> None:
    """Make a checkpoint the one that DeepSpeed loads.

    Raises:
        DataError: the disk refuses.
    """
    write_text(checkpoints / "latest", tag)
