"""Finished runs on disk, one JSON line each, so that an interrupted grid goes on where it stood."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ds_gradprune.codec.header import VERSION
from ds_gradprune.errors import DataError
from labs.convergence.grid import DiLoCo, Grid, Method, Pruned, Update

LAB_VERSION = 1
"""Raised when a change of the laboratory changes all its figures: all runs are then made anew."""
PRODUCT_VERSION = 1
"""The same of the product: runs of its methods are then made anew."""
_FIRST_LAB_CODEC = 2


def run_key(**what: Any) -> str:
    """A name for everything that decides a run's outcome; the method's own name does not."""
    what["lab_version"] = LAB_VERSION
    text = json.dumps(what, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def keys_of(
    grid: Grid,
    method: Method,
    *,
    steps: int,
    workers: int,
    seed: int,
    text: str,
    device: str = "cpu",
) -> tuple[str, str | None]:
    """The key of a run, and that of the same run in the first laboratory.

    The first laboratory simulated islands and pruned gradients itself, by the same equations. Its
    runs differ by chance alone, and a page marks them. Runs of other methods have one key.

    Args:
        grid: what the method stands in.
        method: of the grid.
        steps: of the run.
        workers: simulated ranks.
        seed: of weights and data.
        text: the digest of its bytes.
        device: where the workers train; named in the key where it is not the CPU.

    Returns:
        The keys; None: the first laboratory had no such method.
    """
    where = {
        "model": grid.model.model_dump(),
        "train": grid.train_of(method).model_dump(),
        "steps": steps,
        "workers": workers,
        "seed": seed,
        "text": text,
    }
    if device != "cpu":
        where["device"] = device
    own = method.settings()
    if _goes_ahead(method):
        own["ahead"] = True
    if not isinstance(method, (Pruned, DiLoCo)):
        return run_key(method=own, **where), None
    key = run_key(method=own, codec=VERSION, product=PRODUCT_VERSION, **where)
    is_first = isinstance(method, Pruned) and device == "cpu"
    first = _in_first_lab(method) if is_first else None
    if first is None:
        return key, None
    return key, run_key(method=first, codec=_FIRST_LAB_CODEC, **where)


def _goes_ahead(method: Method) -> bool:
    """Own weights go ahead of an exchange that hides. In runs of before they did not."""
    if not isinstance(method, Update) or not method.overlap:
        return False
    return method.residual == "used" or (method.residual is None and method.sync_every == 1)


def _in_first_lab(method: Pruned) -> dict[str, Any] | None:
    """A method in the first laboratory's words; None where it has none for it."""
    own = method.settings()
    if own.get("ramp_steps"):
        own["ramp_from"] = method.ramp_from
    if not isinstance(method, Update):
        return own
    is_reset = method.residual == "reset" or (method.residual is None and method.sync_every > 1)
    is_slow = method.slow_momentum and method.sync_every > 1
    is_new = method.overlap or method.warmup != "dense" or method.steered is not None
    if is_reset or is_slow or is_new:
        return None
    for now, then in (("update_scale", "scale"), ("slow_momentum", "slow")):
        if now in own:
            own[then] = own.pop(now)
    own.pop("residual", None)
    if "local_lr" in own:
        own["local_lr_from"] = "pruning"
    return own | {"scale_at": "shared", "warmup": "gradient"}


class Store:
    """A file of finished runs.

    Args:
        path: made when the first run is added; an unfinished last line is dropped.

    Attributes:
        path: of the file.

    Raises:
        DataError: a line in the middle is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        self._runs[run["key"]] = run
