"""The folder of one training run: what lies where, and what may be overwritten.

::

    <out>/config.json     the resolved DeepSpeed configuration
    <out>/run.json        what a resumed run must have in common with the first one
    <out>/data/           tokens.bin, tokens.json and tokenizer/
    <out>/log.jsonl       one JSON line per step
    <out>/checkpoints/    DeepSpeed's own files; the newest two
    <out>/model/          a transformers folder, written when the run ends
    <out>/result.json     the run in numbers, written last
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_gradprune.errors import CheckpointError, ConfigError, DataError

KEPT_CHECKPOINTS = 2
"""One to resume from, and the one before in case the newest was cut."""


class RunFolder:
    """Paths of a run and the rules about them. All methods are local.

    Args:
        path: the folder; made when something is first written.
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

    def check_new(self) -> None:
        """Refuse to write into a folder that holds something.

        Raises:
            ConfigError: it does, or it is no folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out must be a folder, got the file {self.path}.")
        if self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(
                f"--out must be a new or empty folder, but {self.path} holds files. Continue that "
                "run with --resume, or name another folder."
            )

    def check_resumable(self, identity: Mapping[str, Any]) -> None:
        """Refuse to resume what is not there, or what was another run.

        Args:
            identity: flag or setting to value; must equal what `write_identity` wrote.

        Raises:
            CheckpointError: there is no checkpoint.
            ConfigError: lists every setting that differs.
        """
        if not self._latest.is_file():
            raise CheckpointError(
                f"--resume must find a checkpoint, but {self.checkpoints} has none. Train without "
                "--resume into a new folder."
            )
        try:
            before = dict(json.loads(self._identity.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as exc:
            raise CheckpointError(f"{self._identity} must be readable: {exc}.") from exc
        faults = [
            f"{name} must be {before.get(name)!r} as in the run that is resumed, got {value!r}."
            for name, value in identity.items()
            if before.get(name) != value
        ]
        if faults:
            raise ConfigError(faults)

    def write_identity(self, identity: Mapping[str, Any]) -> None:
        """Keep what `check_resumable` compares."""
        write_json(self._identity, identity)

    def discard(self) -> None:
        """Remove everything: the run failed before its first step."""
        shutil.rmtree(self.path, ignore_errors=True)

    def drop_old_checkpoints(self) -> None:
        """Remove all checkpoints but the newest ones. Names sort by step."""
        folders = sorted(folder for folder in self.checkpoints.iterdir() if folder.is_dir())
        for folder in folders[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(folder, ignore_errors=True)

    def append_log(self, entry: Mapping[str, Any]) -> None:
        """Add one line to the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(entry)) + "\n")

    def rewind_log(self, step: int) -> None:
        """Drop what was logged after `step`, and a last line that was cut."""
        if not self.log.is_file():
            return
        kept = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # cut by a crash: it belongs to no step
                continue
        _replace(self.log, "".join(kept))


def checkpoint_tag(step: int) -> str:
    """Name of a checkpoint; sorts by step."""
    return f"step{step:08d}"


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document; a reader sees all of it or the one before. Local.

    Raises:
        DataError: the disk refuses.
    """
    _replace(path, json.dumps(dict(document), indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as exc:
        raise DataError(f"{path} must be writable: {exc.strerror}.") from exc
