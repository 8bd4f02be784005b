"""`select` by the accelerator's kernels, with the same bits. Arguments have been checked there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_gradprune.bucket import device as tables_on
from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.native import accelerator


def select(
    parts: Sequence[torch.Tensor],
    terms: Sequence[tuple[torch.Tensor, float]],
    out: SparseBlock,
    *,
    whole: bool,
) -> None:
    """Fill a block with the largest magnitudes of every row of a sum.

    Args:
        parts: the vector: one tensor of the whole bucket, or one per segment.
        terms: up to two addends and their factors.
        out: overwritten.
        whole: `parts` is one tensor of the whole bucket.
    """
    layout, device = out.layout, out.device
    if not layout.numel:
        return
    from ds_gradprune.native.device.select import load
    from ds_gradprune.native.device.select import select as select_rows

    source = tables_on.source(parts, terms, layout, whole=whole)
    with accelerator.at(device):
        for rows, starts in tables_on.dense(layout, device):
            load(source, rows, starts, out.dense)
        for rows, starts in tables_on.pruned(layout, out.k, device):
            select_rows(source, rows, starts, out.k, out.indices, out.values)
