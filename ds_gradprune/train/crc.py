"""A checksum over the bits of tensors. Local."""

from __future__ import annotations

from collections.abc import Iterable

import google_crc32c
import torch


def crc_of(tensors: Iterable[torch.Tensor]) -> int:
    """crc32c over the bits of all tensors, of any dtype and device, in their order. Local."""
    crc = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).contiguous().cpu()
        if flat.numel():
            crc = google_crc32c.extend(crc, flat.view(torch.uint8).numpy())
    return int(crc)
