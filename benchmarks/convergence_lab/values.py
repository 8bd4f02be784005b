"""Values of 1, 2 and 4 bits: what a receiver would decode. A simulation: no bytes are written.

Groups of 128 consecutive values share their scales, which are bf16. Local functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

GROUP_NUMEL = 128

_SCALES = {1: 1, 2: 2, 4: 1}
"""Scales per group."""


def rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Round (n,) float32 values to what a receiver of `bits` bits per value gets.

    4: sign and 0 .. 7 sevenths of the group's largest magnitude. 2: sign and one of two magnitudes,
    the means of the group's magnitudes below and above their mean. 1: sign and the mean magnitude.
    """
    numel = len(values)
    groups = F.pad(values, (0, -numel % GROUP_NUMEL)).view(-1, GROUP_NUMEL)
    size = groups.abs()
    real = (torch.arange(groups.numel()) < numel).view_as(groups)
    sign = torch.where(groups < 0, -1.0, 1.0)
    if bits == 4:
        scale = _bf16(size.amax(1, keepdim=True)).clamp(min=1e-30)
        out = (size / scale * 7).round().clamp(max=7) / 7 * scale * sign
    elif bits == 2:
        mean = _mean(size, real)
        high = size > mean
        out = torch.where(high, _bf16(_mean(size, real & high)), _bf16(_mean(size, real & ~high)))
        out = out * sign
    elif bits == 1:
        out = _bf16(_mean(size, real)) * sign
    else:
        raise ValueError(f"bits must be 1, 2 or 4, got {bits}.")
    return out.view(-1)[:numel]


def values_bytes(numel: int, bits: int) -> int:
    """Bytes of `numel` values with their scales."""
    if bits not in _SCALES:
        return numel * bits // 8
    return -(-numel * bits // 8) + 2 * _SCALES[bits] * -(-numel // GROUP_NUMEL)


def _mean(size: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    count = where.sum(1, keepdim=True).clamp(min=1)
    return torch.where(where, size, 0.0).sum(1, keepdim=True) / count


def _bf16(scale: torch.Tensor) -> torch.Tensor:
    return scale.bfloat16().float()
