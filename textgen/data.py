"""Tokens on disk, and which rank trains on which of them in which step.

A token file is a flat array of little-endian integers (`tokens.bin`) beside a small description
(`tokens.json`). The description is written last, so a folder that has one is complete. Which
windows a step uses is a pure function of (seed, step, micro step, rank): a resumed run needs no
state but its step count, and its place in the data if its number of ranks has changed.

Longer than 300 lines: how tokens are written and read stands in one place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ds_gradprune.errors import DataError

TOKENS, DESCRIPTION = "tokens.bin", "tokens.json"

VALIDATION_PART = 0.05
"""The last part of the text, never trained on."""

VALIDATION_WINDOWS = 64
"""At most so many sequences are measured, spread evenly over the validation part."""


@dataclass(frozen=True, slots=True)
class TokenMeta:
    """What `tokens.json` says.

    Attributes:
        num_tokens: length of the array.
        vocab_size: every token is below it.
        dtype: numpy name of the integers, "<u2" or "<u4".
        digest: sha256 of the file's bytes, hexadecimal: equal digests, equal training data.
        source: name of the text, for people.
    """

    num_tokens: int
    vocab_size: int
    dtype: str
    digest: str
    source: str


def write_tokens(
    folder: Path, chunks: Iterable[npt.NDArray[np.uint32]], vocab_size: int, source: str
) -> TokenMeta:
    """Write a token file; a reader sees all of it or nothing. Local.

    Args:
        folder: made if absent.
        chunks: token arrays, in order.
        vocab_size: decides the integer's width: 2 bytes up to 65,536 entries, else 4.
        source: name of the text.

    Raises:
        DataError: a token is outside the vocabulary, or the disk refuses.
    """
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    num_tokens, digest = 0, hashlib.sha256()
    temporary = folder / f"{TOKENS}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = temporary.open("wb")
    except OSError as exc:
        raise DataError(f"{folder} must be writable: {exc.strerror}.") from exc
    try:
        with file:
            for chunk in chunks:
                if chunk.size and int(chunk.max()) >= vocab_size:
                    raise DataError(
                        f"{source}: every token must be below {vocab_size}, got {chunk.max()}. "
                        "The tokenizer does not belong to this model."
                    )
                data = chunk.astype(dtype).tobytes()
                file.write(data)
                digest.update(data)
                num_tokens += chunk.size
        temporary.replace(folder / TOKENS)
        meta = TokenMeta(num_tokens, vocab_size, dtype.str, digest.hexdigest(), source)
        description = folder / f"{DESCRIPTION}.{os.getpid()}.tmp"
        description.write_text(json.dumps(asdict(meta), indent=1) + "\n", encoding="utf-8")
        description.replace(folder / DESCRIPTION)
    except OSError as exc:
        raise DataError(f"{folder} must be writable: {exc.strerror}.") from exc
    finally:
        temporary.unlink(missing_ok=True)
    return meta


def read_meta(folder: Path) -> TokenMeta | None:
    """The description of a token folder; None if there is none. Local.

    Raises:
        DataError: the description is damaged or does not fit the file beside it.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        meta = TokenMeta(**json.loads(path.read_text(encoding="utf-8")))
        fits = (folder / TOKENS).stat().st_size == meta.num_tokens * np.dtype(meta.dtype).itemsize
    except (OSError, ValueError, TypeError) as exc:
        raise DataError(f"{path} must describe the token file, but is damaged: {exc}.") from exc
    if not fits:
        raise DataError(f"{folder / TOKENS} must hold {meta.num_tokens} tokens, but was cut.")
    return meta


@dataclass(frozen=True, slots=True)
class ValidationBatch:
    """Sequences to measure together.

    Attributes:
        tokens: (batch, seq_len) int64.
        num_sequences: how many of them count: all, or 0 where a rank repeats a batch only so that
            every rank makes the same number of calls.
    """

    tokens: torch.Tensor
    num_sequences: int


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the data a run stands.

    Attributes:
        step: optimizer steps done by then.
        epoch: the epoch that the next step takes its windows from.
        used: windows of that epoch that are used up.
    """

    step: int = 0
    epoch: int = 0
    used: int = 0


START = Position()
"""Of a new run."""


class TokenData:
    """Training and validation sequences of one token file, memory-mapped.

    Args:
        folder: a folder that `write_tokens` filled.
        seq_len: tokens per sequence, >= 2.
        seed: decides the order.

    Raises:
        DataError: no token file, or fewer tokens than one training and one validation sequence.
    """

    def __init__(self, folder: Path, seq_len: int, seed: int) -> None:
        meta = read_meta(folder)
        if meta is None:
            raise DataError(f"{folder} must hold a token file, but has none.")
        if meta.num_tokens < 2 * seq_len:
            raise DataError(
                f"{meta.source} must give at least two sequences of {seq_len} tokens, one to train "
                f"on and one to validate, but gives {meta.num_tokens} tokens. Use a longer text."
            )
        self.meta = meta
        self.seq_len = seq_len
        self._seed = seed
        tokens = np.memmap(folder / TOKENS, dtype=np.dtype(meta.dtype), mode="r")
        held_out = max(seq_len, int(meta.num_tokens * VALIDATION_PART))
        self._train = tokens[: meta.num_tokens - held_out]
        self._validation = tokens[meta.num_tokens - held_out :]
        # Whole sequences, with room to shift their common beginning from epoch to epoch.
        self.num_windows = max(1, (len(self._train) - seq_len + 1) // seq_len)
        self._room = min(seq_len - 1, len(self._train) - self.num_windows * seq_len)
        self._cached: tuple[int, npt.NDArray[np.int64], int] | None = None

    def check_batch(self, windows_per_step: int) -> None:
        """Refuse a text that is shorter than one global batch.

        Args:
            windows_per_step: sequences per optimizer step, over all micro steps and ranks.

        Raises:
            DataError: the text has fewer sequences.
        """
        if self.num_windows < windows_per_step:
            raise DataError(
                f"{self.meta.source} must give at least one global batch of {windows_per_step} "
                f"sequences of {self.seq_len} tokens, but gives {self.num_windows}. Use a longer "
                "text or a smaller batch."
            )

    def position(
        self,
        step: int,
        windows_per_step: int,
        since: Position = START,
    ) -> Position:
        """Where a run stands after `step` steps.

        Args:
            step: optimizer steps done, >= `since.step`.
            windows_per_step: sequences per optimizer step since `since`, over all ranks.
            since: see `sample_batch`.

        Raises:
            DataError: the text is shorter than one global batch.
        """
        self.check_batch(windows_per_step)
        steps = step - since.step
        steps_left = (self.num_windows - since.used) // windows_per_step
        if steps < steps_left:
            return Position(step, since.epoch, since.used + steps * windows_per_step)
        more, position = divmod(steps - steps_left, self.num_windows // windows_per_step)
        return Position(step, since.epoch + 1 + more, position * windows_per_step)

    def sample_batch(
        self,
        step: int,
        micro_step: int,
        *,
        micro_steps: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        since: Position = START,
    ) -> torch.Tensor:
        """The sequences one rank trains on in one micro step.

        An epoch is a permutation of all windows, dealt out step by step; no window is used twice
        in it, on any rank. What does not fill a last step is left out.

        Args:
            step: optimizer steps done before, >= 0.
            micro_step: 0 .. micro_steps - 1.
            micro_steps: micro steps per optimizer step.
            micro_batch: sequences per rank and micro step.
            rank: 0 .. world_size - 1.
            world_size: number of ranks.
            since: where the batch size became what it is; the beginning if it never changed.

        Returns:
            (micro_batch, seq_len) int64, on the CPU.

        Raises:
            DataError: the text is shorter than one global batch.

        Local: no rank needs to ask another.
        """
        windows_per_step = micro_steps * micro_batch * world_size
        at = self.position(step, windows_per_step, since)
        order, shift = self._epoch(at.epoch)
        first = at.used + (micro_step * world_size + rank) * micro_batch
        begins = order[first : first + micro_batch] * self.seq_len + shift
        return _rows(self._train, begins, self.seq_len)

    def validation_batches(
        self, micro_batch: int, rank: int, world_size: int, most: int = VALIDATION_WINDOWS
    ) -> Iterator[ValidationBatch]:
        """This rank's share of the fixed validation sequences.

        Every rank yields the same number of batches, because a forward pass may be collective.

        Args:
            micro_batch: sequences per batch at most.
            rank: 0 .. world_size - 1.
            world_size: number of ranks.
            most: sequences of all ranks together, evenly spread over the text.
        """
        total = len(self._validation) // self.seq_len
        count = min(total, most)
        begins = np.arange(count, dtype=np.int64) * total // count * self.seq_len
        batches = [begins[i : i + micro_batch] for i in range(0, count, micro_batch)]
        for turn in range(0, len(batches), world_size):
            mine = turn + rank
            counts = mine < len(batches)
            rows = batches[mine] if counts else batches[0]
            yield ValidationBatch(
                _rows(self._validation, rows, self.seq_len), len(rows) if counts else 0
            )

    def _epoch(self, epoch: int) -> tuple[npt.NDArray[np.int64], int]:
        """The order of windows in one epoch, and by how many tokens they are shifted.

        Philox's raw stream is part of numpy's compatibility promise, Generator.permutation is not:
        a run resumed under a newer numpy keeps its order.
        """
        if self._cached is not None and self._cached[0] == epoch:
            return self._cached[1:]
        raw = np.random.Philox(key=[self._seed, epoch]).random_raw(self.num_windows + 1)
        order = np.argsort(raw[1:], kind="stable").astype(np.int64)
        self._cached = (epoch, order, int(raw[0] % np.uint64(self._room + 1)))
        return self._cached[1:]


def _rows(
    tokens: npt.NDArray[np.integer[npt.NBitBase]], begins: npt.NDArray[np.int64], seq_len: int
) -> torch.Tensor:
    rows = tokens[begins[:, None] + np.arange(seq_len, dtype=np.int64)[None, :]]
    return torch.from_numpy(rows.astype(np.int64))
