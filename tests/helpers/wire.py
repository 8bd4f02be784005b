"""Headers, messages and virtual links for tests of the wire."""

from __future__ import annotations

from typing import Any

import torch

from ds_gradprune import codec
from ds_gradprune.law.signals import RankSignals

SIGNALS = RankSignals(1.5, False, 0.1, 0.2, 0.3, 400, 7)


def announcement_of(rank: int, *, step: int = 3, k: int = 41, **signals: Any) -> torch.Tensor:
    """A header without a body."""
    told = {name: getattr(SIGNALS, name) for name in RankSignals.__dataclass_fields__} | signals
    return codec.encode_signals(step=step, rank=rank, k=k, signals=RankSignals(**told))


def filled(rank: int, sizes: list[int]) -> torch.Tensor:
    """A message whose payload b of rank r holds 10 * r + b everywhere."""
    parts = [torch.full((n,), 10 * rank + b, dtype=torch.uint8) for b, n in enumerate(sizes)]
    return torch.cat([torch.empty(0, dtype=torch.uint8), *parts])
