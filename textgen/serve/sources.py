"""Where a model comes from: a model folder, or the folder of a run that may still be training."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ds_gradprune.errors import DataError
from textgen.model import check_fits, check_model_name, load_model, open_model
from textgen.serve.served import Served
from textgen.tokenizer import load_tokenizer

_STATES = "mp_rank_00_model_states.pt"


class Source(Protocol):
    """A place that may hold a newer model later."""

    name: str

    def version(self) -> str | None:
        """What tells the model there now from an earlier one; None: nothing to load now."""

    def load(self, context: int) -> Served:
        """Load what is there now.

        Raises:
            DataError: it cannot be read.
        """


def open_source(path: str, name: str | None = None) -> Source:
    """The source that a path means.

    Args:
        path: a model folder, a hub name, or the folder of a run of ours.
        name: what clients call it; None: the folder's name.

    Raises:
        DataError: it is none of them.
    """
    folder = Path(path)
    if (folder / "run.json").is_file() and not (folder / "model_type").exists():
        return RunSource(folder, name or folder.resolve().name)
    check_model_name(path, has_weights=True)
    label = folder.resolve() if folder.is_dir() else folder
    usual = label.parent.name if label.name == "model" and label.parent.name else label.name
    return FolderSource(path, name or usual)


@dataclass
class FolderSource:
    """A transformers folder or hub name."""

    path: str
    name: str

    def version(self) -> str | None:
        """Changes with any of its files."""
        folder = Path(self.path)
        return _stamp(folder) if folder.is_dir() else "hub"

    def load(self, context: int) -> Served:
        """See `Source`."""
        version = self.version() or ""
        model, tokenizer = load_model(self.path), load_tokenizer(self.path)
        check_fits(self.path, model, tokenizer)
        return Served.of(model, tokenizer, self.name, version, context)


@dataclass
class RunSource:
    """The folder of a run: its model once it has ended, its newest checkpoint before."""

    folder: Path
    name: str

    def version(self) -> str | None:
        """Names the checkpoint; with the time of the model folder once there is one."""
        model, tag = self.folder / "model", self._tag()
        latest = self.folder / "checkpoints" / "latest"
        if (model / "config.json").is_file() and not _is_newer(latest, model):
            return _stamp(model)
        return tag

    def load(self, context: int) -> Served:
        """See `Source`."""
        version = self.version()
        if version is None:
            raise DataError(
                f"{self.folder} must hold a model or a checkpoint, but the run has written none "
                "yet. Wait for its first one (--save-every)."
            )
        if version == self._tag():
            model, tokenizer = self._checkpoint(version)
        else:
            path = str(self.folder / "model")
            model, tokenizer = load_model(path), load_tokenizer(path)
        return Served.of(model, tokenizer, self.name, version, context)

    def _tag(self) -> str | None:
        try:
            text = (self.folder / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
        return text if text and "/" not in text and not text.startswith(".") else None

    def _checkpoint(self, tag: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The weights that all islands share, in a model of the run's shape."""
        path = self.folder / "checkpoints" / tag / _STATES
        if not path.is_file():
            raise DataError(
                f"{path} must hold the whole model, but is missing: ZeRO stage 3 spreads it over "
                "the ranks' files. Serve the model folder that the run writes when it ends."
            )
        tokenizer = load_tokenizer(str(self.folder / "data" / "tokenizer"))
        try:
            run: Any = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            weights = torch.load(path, map_location="cpu", weights_only=True)["module"]
            model = open_model(str(run["--model"]), tokenizer, 0)
            model.load_state_dict({key: value.float() for key, value in weights.items()})
        except DataError:
            raise
        # A checkpoint that is being replaced raises whatever its reader stumbles over.
        except Exception as exc:
            line = (str(exc).strip().splitlines() or [""])[0][:200].rstrip(".")
            raise DataError(
                f"The checkpoint {path.parent} must be readable: {type(exc).__name__} {line}."
            ) from exc
        return model, tokenizer


def _stamp(folder: Path) -> str | None:
    """Sizes and times of a model folder's files as a short text; None while it is replaced."""
    try:
        files = sorted(f for f in folder.iterdir() if f.is_file() and f.name[0] != ".")
        facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns, f.stat().st_ino) for f in files]
    except OSError:
        return None
    if not any(name == "config.json" for name, *_ in facts):
        return None
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _is_newer(path: Path, other: Path) -> bool:
    try:
        return path.stat().st_mtime > (other / "config.json").stat().st_mtime
    except OSError:
        return False
