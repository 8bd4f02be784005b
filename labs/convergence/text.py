"""Real text as numbers: one number per distinct byte.

Which sequences a step uses is a pure function of seed, step and worker, so methods see equal data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ds_gradprune.errors import DataError

VALIDATION_PART = 0.1
"""The last part of the text; never trained on."""


class Batches:
    """The sequences of all steps of some runs, by where they begin.

    Args:
        tokens: (n,) int64, the text.
        begins: (steps, runs, workers * batch) int64.
        shape: workers and batch.
        context: tokens per sequence.
    """

    def __init__(
        self, tokens: torch.Tensor, begins: torch.Tensor, shape: tuple[int, int], context: int
    ) -> None:
        self._tokens = tokens
        self._begins = begins
        self._shape = shape
        self._context = context

    def to(self, device: str) -> Batches:
        """The same on a device."""
        tokens, begins = self._tokens.to(device), self._begins.to(device)
        return Batches(tokens, begins, self._shape, self._context)

    def of(self, step: int) -> torch.Tensor:
        """(runs, workers, batch, context + 1) int64."""
        places = torch.arange(self._context + 1, device=self._begins.device)
        return self._tokens[self._begins[step][..., None] + places].unflatten(1, self._shape)


class Text:
    """A text, cut in two.

    Args:
        path: any file; its bytes are the tokens.
        context: tokens per sequence.

    Attributes:
        vocab_size: number of distinct bytes.
        digest: of the file's bytes.

    Raises:
        DataError: the file cannot be read or is too short.
    """

    def __init__(self, path: Path, context: int) -> None:
        try:
            data = path.read_bytes()
        except OSError as exc:
            raise DataError(f"--text must be a readable file, got {path}: {exc.strerror}.") from exc
        if len(data) < 20 * (context + 1):
            raise DataError(
                f"--text must have at least {20 * (context + 1)} bytes for sequences of {context}, "
                f"got {len(data)}. Use a longer text."
            )
        self.digest = hashlib.sha256(data).hexdigest()[:16]
        letters, tokens = np.unique(np.frombuffer(data, dtype=np.uint8), return_inverse=True)
        self.vocab_size = len(letters)
        self._tokens = torch.from_numpy(tokens.astype(np.int64))
        self._train_numel = int(len(data) * (1 - VALIDATION_PART))
        self._context = context

    def batches(self, seeds: Sequence[int], steps: int, workers: int, batch: int) -> Batches:
        """The sequences of every step of some runs, drawn at random places.

        Args:
            seeds: of the runs; a run's sequences do not depend on the others.
            steps: optimizer steps.
            workers: in every run; a worker's sequences do not depend on who asks.
            batch: sequences per worker and step.
        """
        places = {
            seed: torch.stack([self._begins(seed, step, workers * batch) for step in range(steps)])
            for seed in dict.fromkeys(seeds)
        }
        begins = torch.stack([places[seed] for seed in seeds], dim=1)
        return Batches(self._tokens, begins, (workers, batch), self._context)

    def _begins(self, seed: int, step: int, count: int) -> torch.Tensor:
        """(count,) int64, where the sequences of a step begin."""
        raw = np.random.Philox(key=[seed, step]).random_raw(count)
        begins = (raw % np.uint64(self._train_numel - self._context - 1)).astype(np.int64)
        return torch.from_numpy(begins)

    def validation(self, sequences: int | None = None) -> torch.Tensor:
        """(n, context + 1): the validation part in sequences, each token predicted once.

        Args:
            sequences: so many, evenly spread; None: all.
        """
        part = self._tokens[self._train_numel :]
        count = (len(part) - 1) // self._context
        begins = torch.arange(count) * self._context
        if sequences is not None and sequences < count:
            begins = begins[torch.arange(sequences) * count // sequences]
        return part[begins[:, None] + torch.arange(self._context + 1)]
