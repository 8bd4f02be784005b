"""Bytes of one rank for all, over a transport that can add up."""

from __future__ import annotations

import torch

from ds_gradprune.errors import WireFormatError
from ds_gradprune.wire.transport import Transport

MAX_BYTES = 2**37
"""More is noise on the wire: no host holds a vector of that size."""


def bytes_of(transport: Transport, data: torch.Tensor, is_source: bool) -> torch.Tensor:
    """The source's bytes, (n,) uint8; the others bring none. Collective.

    Raises:
        WireFormatError: it tells a length that cannot be.
    """
    length = torch.tensor([data.numel() if is_source else 0], dtype=torch.int64)
    transport.all_reduce(length)
    total = int(length)
    if not 0 <= total <= MAX_BYTES:
        raise WireFormatError(f"a rank must hand on at most {MAX_BYTES} bytes, got {total}.")
    # Whole numbers, to which others add zeros: bits stay as they are.
    padded = torch.zeros(-(-total // 4) * 4, dtype=torch.uint8)
    if is_source:
        padded[:total] = data.cpu()
    transport.all_reduce(padded.view(torch.int32))
    return padded[:total]
