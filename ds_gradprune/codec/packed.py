"""Indices of 12 bits, two in three bytes.

Two indices a, b become the three bytes ``a & 255``, ``a >> 8 | (b & 15) << 4``, ``b >> 4``. If the
number of indices is odd, the last b is 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ds_gradprune.codec.base import Bytes
from ds_gradprune.codec.body import Codec
from ds_gradprune.errors import WireFormatError
from ds_gradprune.records import CHUNK_NUMEL, BucketLayout
from ds_gradprune.rows import num_kept, runs


class PackedCodec(Codec):
    """12 bits per index at any density; above 1 / 12 a bitmap would be smaller."""

    @property
    def name(self) -> str:
        """Short name for logs and file names."""
        return f"packed-{self.values.name}"

    def accepts(self, k: int) -> bool:
        """Every k."""
        return 1 <= k <= CHUNK_NUMEL

    def places_bytes(self, num_kept: int) -> int:
        """Three bytes for two indices, rounded up."""
        return 3 * ((num_kept + 1) // 2)

    def write_places(self, indices: npt.NDArray[np.int16], out: Bytes) -> None:
        """Pack pairs."""
        triples = out.reshape(-1, 3)
        first, second = indices[0::2], indices[1::2]
        if len(second) < len(first):
            second = np.append(second, np.int16(0))
        triples[:, 0] = first & 0xFF
        triples[:, 1] = first >> 8 | (second & 0xF) << 4
        triples[:, 2] = second >> 4

    def read_places(self, places: Bytes, layout: BucketLayout, k: int) -> torch.Tensor:
        """Unpack pairs and check what came out."""
        triples = places.reshape(-1, 3)
        middle = triples[:, 1].astype(np.int16)
        indices = np.empty(2 * len(triples), dtype=np.int16)
        indices[0::2] = triples[:, 0] | (middle & 0xF) << 8
        indices[1::2] = middle >> 4 | triples[:, 2].astype(np.int16) << 4
        count = num_kept(layout, k)
        if count < len(indices) and indices[count]:
            raise WireFormatError("payload's odd index must be padded with zero.")
        _check_indices(indices[:count], layout, k)
        return torch.from_numpy(indices[:count])


def _check_indices(indices: npt.NDArray[np.int16], layout: BucketLayout, k: int) -> None:
    """Indices must lie inside their row and rise, so that none occurs twice.

    Args:
        indices: (num_kept,), >= 0.
        layout: the bucket's layout.
        k: kept elements per full row.

    Raises:
        WireFormatError: they do not.
    """
    for run in runs(layout, k):
        table = indices[run.kept_start : run.kept_stop].reshape(run.num_rows, run.row_kept)
        if (table[:, 1:] <= table[:, :-1]).any():
            raise WireFormatError("payload's indices must rise inside every row.")
        last = int(table[:, -1].max())
        if last >= run.row_numel:
            raise WireFormatError(
                f"payload's indices must be below {run.row_numel}, the length of their row, "
                f"got {last}."
            )
