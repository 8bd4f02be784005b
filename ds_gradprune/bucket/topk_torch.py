"""The k largest magnitudes of every row, in torch operations alone: for accelerators.

Knows nothing of buckets and layouts. `topk_cpu` gives the same bits on CPUs, several times faster.
Nothing here waits for the device.
"""

from __future__ import annotations

import torch

_INDEX_BITS = 12
_MAGNITUDE_MASK = 0x7FFFFFFF


def top_k(t: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    """Find the largest magnitudes of every row, on any device.

    A key holds the 31 bits of the magnitude above 4095 - index. Keys differ from each other, so any
    top-k of them is the exact one, and of equal magnitudes the lowest index wins.

    Args:
        t: (rows, row_numel) float32, row_numel <= 4096.
        indices: (rows, k) int16, 1 <= k <= row_numel; receives the places, ascending in each row.
        values: (rows, k) float32; receives the elements of `t` there.
    """
    row_numel = t.shape[1]
    keys = (t.view(torch.int32) & _MAGNITUDE_MASK).to(torch.int64)
    keys <<= _INDEX_BITS
    keys |= torch.arange(row_numel - 1, -1, -1, device=t.device)
    places = keys.topk(indices.shape[1], dim=1, sorted=False).indices.to(torch.int16)
    indices.copy_(places.sort(dim=1).values)
    values.copy_(t.gather(1, indices.to(torch.int64)))
