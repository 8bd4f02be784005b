"""Real text as numbers: one number per distinct byte.

Which sequences a step uses is a pure function of seed, step and worker, so methods see equal data.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from ds_gradprune.errors import DataError

VALIDATION_PART = 0.1
"""The last part of the text; never trained on."""


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

    def batch(self, seed: int, step: int, workers: int, batch: int) -> torch.Tensor:
        """Sequences of one step, drawn at random places.

        Returns:
            (workers, batch, context + 1) int64; worker w's rows do not depend on who asks.
        """
        raw = np.random.Philox(key=[seed, step]).random_raw(workers * batch)
        begins = (raw % np.uint64(self._train_numel - self._context - 1)).astype(np.int64)
        rows = torch.from_numpy(begins)[:, None] + torch.arange(self._context + 1)
        return self._tokens[rows].view(workers, batch, -1)

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
