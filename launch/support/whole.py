"""Which checkpoint of a run is whole: every file in it is read against the checksums inside it.

DeepSpeed's files and ours are zip archives with a crc32 per member, which torch.load does not look
at. All functions are local: files of hosts that share no disk with this one are checked there, when
they are loaded. Torch is not needed.
"""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ds_gradprune.errors import DataError

_TAG = re.compile(r"[^0-9]*([0-9]+)")


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with the first damaged file of a checkpoint; None: nothing."""
    files = sorted(checkpoint.rglob("*.pt"))
    if not files:
        return f"{checkpoint} holds no file of a checkpoint"
    for path in files:
        try:
            with zipfile.ZipFile(path) as archive:
                member = archive.testzip()
        # What zipfile raises on damaged headers: its own error, and what the numbers in them trip.
        except (OSError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError) as exc:
            return f"{path} is damaged: {exc}"
        if member is not None:
            return f"{path} is damaged: the checksum of {member} is wrong"
    return None


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
    latest = checkpoints / "latest"
    temporary = checkpoints / f".latest.{os.getpid()}.tmp"
    try:
        temporary.write_text(tag, encoding="utf-8")
        temporary.replace(latest)
    except OSError as exc:
        raise DataError(f"{latest} must be writable: {exc.strerror}.") from exc
