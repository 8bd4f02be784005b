"""Every value, no indices: for k = CHUNK_NUMEL."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ds_gradprune.codec.base import Bytes
from ds_gradprune.codec.body import Codec
from ds_gradprune.records import CHUNK_NUMEL, BucketLayout
from ds_gradprune.rows import runs


class DenseCodec(Codec):
    """Places take no bytes: every element of every row is there."""

    @property
    def name(self) -> str:
        """Short name for logs and file names."""
        return f"dense-{self.values.name}"

    def accepts(self, k: int) -> bool:
        """Only blocks that keep everything."""
        return k == CHUNK_NUMEL

    def places_bytes(self, num_kept: int) -> int:
        """None."""
        return 0

    def write_places(self, indices: npt.NDArray[np.int16], out: Bytes) -> None:
        """Nothing to write."""

    def read_places(self, places: Bytes, layout: BucketLayout, k: int) -> torch.Tensor:
        """All positions of every row."""
        rows = [
            np.tile(np.arange(run.row_numel, dtype=np.int16), run.num_rows)
            for run in runs(layout, k)
        ]
        return torch.from_numpy(np.concatenate(rows) if rows else np.empty(0, dtype=np.int16))
