"""In which order a fine-tuning takes its sequences, whatever the number of ranks was.

Each epoch is a permutation of its own. The Trainer sees them one behind the other, as one long
data set that it reads in order, and skips what its steps have used at the batch of now. Where other
ranks made some of those steps, they used another number of sequences: the order is shifted by it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from ds_gradprune.errors import CheckpointError

from .run_folder import write_json
from .tuning_data import Row

NAME = "position.json"
"""Beside a checkpoint's other files, on rank 0's host."""


@dataclass(frozen=True)
class Since:
    """Where a run has begun, or has been resumed.

    Attributes:
        step: optimizer steps that were done.
        sequences: so many they have used.
        ranks: of the run before; 0: there was none.
    """

    step: int = 0
    sequences: int = 0
    ranks: int = 0

    def after(self, step: int, per_step: int) -> int:
        """Sequences that are used after a later step; `per_step` of them in each since. Pure."""
        return self.sequences + (step - self.step) * per_step


class Order(Dataset[Row]):
    """The sequences of a run, in order, from its first step to its last.

    Args:
        rows: the sequences of one epoch.
        seed: equal on all ranks.
        steps: optimizer steps of the run in all.
        per_step: sequences of one step, over all ranks.
        since: from where on that is so.
    """

    def __init__(
        self, rows: Sequence[Row], seed: int, steps: int, per_step: int, since: Since
    ) -> None:
        self._rows = rows
        self._seed = seed
        self._numel = steps * per_step
        self._shift = since.sequences - since.step * per_step
        self._epoch = -1
        self._permutation = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._numel

    def __getitem__(self, index: int) -> Row:
        """What is used at the place; before `since` it is never asked for."""
        epoch, place = divmod(index + self._shift, len(self._rows))
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self._seed, epoch]).permutation(
                len(self._rows)
            )
        return self._rows[int(self._permutation[place])]


def write_since(checkpoint: Path, since: Since) -> None:
    """Note in a checkpoint where the run stands. Local.

    Raises:
        DataError: the disk refuses.
    """
    write_json(checkpoint / NAME, vars(since))


def read_since(checkpoint: Path) -> Since:
    """What `write_since` has noted. Local.

    Raises:
        CheckpointError: it is not there, or not whole.
    """
    path = checkpoint / NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Since(int(found["step"]), int(found["sequences"]), int(found["ranks"]))
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise CheckpointError(
            f"{path} must say which sequences were used, but cannot be read: {exc}. Write the name "
            f"of another checkpoint into {checkpoint.parent / 'latest'}."
        ) from exc
