"""The folder of one training run: what lies where, and what may be overwritten.

::

    <out>/run.json        what a resumed run must have in common with the first one
    <out>/config.json     the resolved DeepSpeed configuration
    <out>/data/           tokens.bin, tokens.json and tokenizer/
    <out>/log.jsonl       one JSON line per step; validation.json beside it, loss by loss
    <out>/checkpoints/    DeepSpeed's own files; the newest two
    <out>/model/          a transformers folder, written when the run ends
    <out>/result.json     the run in numbers, written last

A run claims its folder by making run.json, which succeeds once, and holds a lock on it while it
lives. What lies in a claimed folder under these names is that run's, and nothing else is removed.

Longer than 300 lines: a folder from its claim to its last checkpoint, and files written whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_gradprune.errors import CheckpointError, ConfigError, DataError

logger = logging.getLogger("ds_gradprune")

KEPT_CHECKPOINTS = 2
"""One to resume from, and the one before in case the newest was cut."""

_TAG = re.compile(r"step\d{8,}")
_PARTS = "config.json data log.jsonl validation.json checkpoints model result.json run.json".split()


class RunFolder:
    """Paths of a run and the rules about them. All methods are local.

    Args:
        path: the folder; made when it is claimed, or something is first written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.data = path / "data"
        self.log = path / "log.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.result = path / "result.json"
        self._identity = path / "run.json"
        self._latest = self.checkpoints / "latest"
        self._made: list[Path] = []
        self._lock: int | None = None
        self._facts = ""

    def check_new(self) -> None:
        """Refuse to write into a folder that holds something.

        Raises:
            ConfigError: it does, or it is no folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out must be a folder, got the file {self.path}.")
        if not self.is_empty():
            raise ConfigError(
                f"--out must be a new or empty folder, but {self.path} holds files. Continue that "
                "run with --resume, or name another folder."
            )

    def is_empty(self) -> bool:
        """Whether nothing lies there yet."""
        return not self.path.is_dir() or not any(self.path.iterdir())

    def logged(self) -> object:
        """Changes with every step that is logged."""
        try:
            found = self.log.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    def begin_again(self) -> None:
        """Remove what a run has left that ended before its first checkpoint."""
        if self.newest() is None and not is_in_use(self.path):
            self._made = [self.path / name for name in _PARTS]
            self.discard()

    def claim(self, identity: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> None:
        """Make the folder this run's own.

        Args:
            identity: flag or setting to value; what a resumed run must have in common.
            notes: more that a resumed run wants to know.

        Raises:
            ConfigError: the folder holds something, or another run was faster.
            DataError: the disk refuses.
        """
        self.check_new()
        is_new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._identity, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            raise ConfigError(
                f"--out must be a folder of this run alone, but another run has just begun in "
                f"{self.path}. Name another folder."
            ) from None
        except OSError as exc:
            raise DataError(f"{self.path} must be writable: {exc.strerror}.") from exc
        self._made = [self.path / name for name in _PARTS] + ([self.path] if is_new else [])
        self._hold()
        self._facts = _as_text(dict(identity) | dict(notes or {}))
        self._write_facts()

    def share(self) -> None:
        """Remember what this host will make where it does not see rank 0's folder. For `discard`.

        Before anything is made by any rank.
        """
        is_new = not self.path.exists()
        if not self.data.exists():
            self._made = [self.data] + ([self.path] if is_new else [])

    def resume(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Take over the folder of a run that has ended.

        Args:
            identity: flag or setting to value; must equal what `claim` was given.

        Returns:
            Identity and notes of the run.

        Raises:
            CheckpointError: it is no folder of a run.
            ConfigError: the run is still alive, or lists every setting that differs.
        """
        try:
            self._lock = os.open(self._identity, os.O_RDWR)
            self._facts = self._identity.read_text(encoding="utf-8")
            before = dict(json.loads(self._facts))
        except (OSError, ValueError, TypeError) as exc:
            raise CheckpointError(f"{self._identity} must be readable: {exc}.") from exc
        self._hold()
        faults = [
            f"{name} must be {before.get(name)!r} as in the run that is resumed, got {value!r}."
            for name, value in identity.items()
            if before.get(name) != value
        ]
        if faults:
            raise ConfigError(faults)
        return before

    def hold_again(self) -> None:
        """Lock the folder of a run that goes on, after the rank that had the lock was lost.

        Raises:
            ConfigError: another process has it.
        """
        with contextlib.suppress(FileNotFoundError):  # this host has a disk of its own
            self._lock = os.open(self._identity, os.O_RDWR)
            self._hold()
            self._facts = self._identity.read_text(encoding="utf-8")

    def release(self) -> None:
        """Let another process resume the run; twice is fine."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def newest(self) -> str | None:
        """The name of the checkpoint that a resumed run loads; None: there is none."""
        try:
            return self._latest.read_text(encoding="utf-8").strip() or None
        except (OSError, ValueError):
            return None

    def name_newest(self, tag: str) -> None:
        """Make a checkpoint the one that a resumed run loads: all ranks have written it.

        If the folder that was claimed is gone by now, that where it lies is claimed, too.

        Raises:
            DataError: the disk refuses.
        """
        write_text(self._latest, tag)
        if self._lock is None or not self._facts or self._is_there():
            return
        logger.warning(
            "%s was removed, or its disk was unmounted. It was made again, and %s is the only "
            "checkpoint in it.",
            self.path,
            tag,
        )
        self.release()
        try:
            self._lock = os.open(self._identity, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
        except OSError as exc:
            raise DataError(f"{self._identity} must be writable: {exc.strerror}.") from exc
        self._hold()
        self._write_facts()

    def discard(self) -> None:
        """Remove what this run has made: it failed before its first step."""
        for path in self._made:
            if path == self.path:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def drop_old_checkpoints(self) -> None:
        """Remove this run's checkpoints but the newest, and never the one to resume from."""
        folders = sorted(
            folder
            for folder in self.checkpoints.iterdir()
            if folder.is_dir() and not folder.is_symlink() and _TAG.fullmatch(folder.name)
        )
        for folder in folders[:-KEPT_CHECKPOINTS]:
            if folder.name != self.newest():
                shutil.rmtree(folder, ignore_errors=True)

    def drop_unfinished(self, tag: str) -> None:
        """Remove a checkpoint that could not be written whole."""
        if self.newest() != tag:
            shutil.rmtree(self.checkpoints / tag, ignore_errors=True)

    def _is_there(self) -> bool:
        """Whether the file that is locked is the one that others see."""
        assert self._lock is not None
        try:
            return os.path.samestat(os.fstat(self._lock), self._identity.stat())
        except OSError:
            return False

    def _write_facts(self) -> None:
        """Into the file that is locked: another one in its place would not be."""
        assert self._lock is not None
        try:
            os.write(self._lock, self._facts.encode())
        except OSError as exc:
            raise DataError(f"{self._identity} must be writable: {exc.strerror}.") from exc

    def _hold(self) -> None:
        """Lock the folder until this process ends."""
        if not _locked(self._lock):
            raise ConfigError(
                f"--out must be the folder of a run that has ended, but another process trains in "
                f"{self.path}. End it first."
            )


def is_in_use(path: Path) -> bool:
    """Whether a process trains in a run folder right now. Local."""
    try:
        lock = os.open(path / "run.json", os.O_RDWR)
    except OSError:
        return False
    with os.fdopen(lock):
        return not _locked(lock)


def _locked(lock: int | None) -> bool:
    """Whether this process has the lock now. A disk that knows no locks gives it to everybody."""
    assert lock is not None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def checkpoint_tag(step: int) -> str:
    """Name of a checkpoint; sorts by step."""
    return f"step{step:08d}"


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document; a reader sees all of it or the one before. Local.

    Numbers that JSON has not, inf and nan, are written as null.

    Raises:
        DataError: the disk refuses.
    """
    write_text(path, _as_text(document))


def write_text(path: Path, text: str) -> None:
    """Write a file; a reader sees all of it or the one before. Local.

    Raises:
        DataError: the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as exc:
        raise DataError(f"{path} must be writable: {exc.strerror}.") from exc
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _as_text(document: Mapping[str, Any]) -> str:
    return json.dumps(_finite(dict(document)), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value with null for every inf and nan in it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
