"""A sum over all bits of a vector, which tells whether somebody has written it.

Each element counts with a weight given by its position, so elements that change places or signs are
seen. The kernels and torch operations on any device agree. All functions are local.
"""

from __future__ import annotations

import torch

from ds_gradprune.native.library import kernels

_STEP, _OFFSET = 0x9E3779B1, 0x7F4A7C15
"""Weight of position p: p * step + offset modulo 2**32; the step is odd, so weights differ."""

_SPAN_NUMEL = 1 << 20


@torch.no_grad()
def checksum(vector: torch.Tensor, start: int = 0) -> int:
    """Sum of bits times weights, modulo 2**64.

    Args:
        vector: (numel,) float32, contiguous, any device.
        start: position of its first element; sums of parts add up to the sum of the whole.
    """
    native = kernels() if vector.device.type == "cpu" else None
    if native is None:
        return reference(vector, start)
    return native.checksum(vector.detach().numpy(), start, torch.get_num_threads())


def reference(vector: torch.Tensor, start: int = 0) -> int:
    """`checksum` in torch operations."""
    total = 0
    for first in range(0, vector.numel(), _SPAN_NUMEL):
        bits = vector.detach()[first : first + _SPAN_NUMEL].view(torch.int32).to(torch.int64)
        places = torch.arange(len(bits), dtype=torch.int64, device=vector.device)
        weights = (places + (start + first) % 2**32) * _STEP + _OFFSET
        total += int(((bits & 0xFFFFFFFF) * (weights & 0xFFFFFFFF)).sum())  # wraps
    return total % 2**64
