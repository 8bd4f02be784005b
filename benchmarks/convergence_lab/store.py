"""Finished runs on disk, one JSON line each, so that an interrupted grid goes on where it stood."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ds_gradprune.errors import DataError

LAB_VERSION = 1
"""Raised when a change of the laboratory changes its figures: earlier runs are then made anew."""


def run_key(**what: Any) -> str:
    """A name for everything that decides a run's outcome; the method's own name does not."""
    what["lab_version"] = LAB_VERSION
    text = json.dumps(what, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """A file of finished runs.

    Args:
        path: made when the first run is added; an unfinished last line is dropped.

    Raises:
        DataError: a line in the middle is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs: dict[str, dict[str, Any]] = {}
        if not path.is_file():
            return
        text = path.read_text(encoding="utf-8")
        whole, _, rest = text.rpartition("\n")
        if rest:
            path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                run = json.loads(line)
                self._runs[run["key"]] = run
            except (ValueError, KeyError, TypeError) as exc:
                raise DataError(
                    f"{path}, line {number}, must be a finished run, but is damaged: {exc}. "
                    "Remove the line; that run is then made anew."
                ) from exc

    def get(self, key: str) -> dict[str, Any] | None:
        """A finished run."""
        return self._runs.get(key)

    def add(self, run: dict[str, Any]) -> None:
        """Append a run; it is on disk when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        self._runs[run["key"]] = run
