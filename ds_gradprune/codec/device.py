"""Bodies written and read on an accelerator, so that payloads alone cross to the host and back.

The bytes are those that `values`, `levels` and `places` write, which are the reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.bucket.layout import BucketLayout
from ds_gradprune.codec.levels import Levels
from ds_gradprune.codec.places import Group, groups
from ds_gradprune.codec.values import MAX_BFLOAT16, ValueFormat
from ds_gradprune.native import accelerator

if TYPE_CHECKING:
    from ds_gradprune.native.device.places import Code

Formats = tuple[ValueFormat, ValueFormat]
"""Of kept values and of dense ones."""


def write_body(
    block: SparseBlock, formats: Formats, cuts: Sequence[int], size: int
) -> torch.Tensor:
    """All bytes of a payload but for its header, on the block's device.

    Args:
        block: what to send.
        formats: how values are written.
        cuts: where the header, the values, the dense values and the places end.
        size: bytes of the payload, a multiple of 4.

    Returns:
        (size,) uint8; the header's bytes are 0.
    """
    from ds_gradprune.native.device import places

    payload = torch.zeros(size, dtype=torch.uint8, device=block.device)
    values, dense, where = _cut(payload, cuts)
    with accelerator.at(block.device):
        _write_values(formats[0], block.values, values)
        _write_values(formats[1], block.dense, dense)
        for group, code, starts, low, high in _streams(block.layout, block.k, where):
            if group.nbytes:
                places.write(code, starts, block.indices, low, high)
    return payload


def read_body(
    payload: torch.Tensor, formats: Formats, cuts: Sequence[int], out: SparseBlock
) -> None:
    """Fill a block from a payload on its device, whose bytes the host has checked.

    Args:
        payload: (n,) uint8.
        formats: as for `write_body`.
        cuts: as there.
        out: overwritten.
    """
    from ds_gradprune.native.device import places

    values, dense, where = _cut(payload, cuts)
    with accelerator.at(out.device):
        _read_values(formats[0], values, out.values)
        _read_values(formats[1], dense, out.dense)
        for _, code, starts, low, high in _streams(out.layout, out.k, where):
            places.read(code, starts, low, high, out.indices)


def _cut(payload: torch.Tensor, cuts: Sequence[int]) -> tuple[torch.Tensor, ...]:
    return tuple(payload[start:stop] for start, stop in itertools.pairwise(cuts))


def _write_values(how: ValueFormat, values: torch.Tensor, out: torch.Tensor) -> None:
    if isinstance(how, Levels):
        from ds_gradprune.native.device import levels

        levels.write(how.bits, how.shares, how.widest, values, out)
    elif how.bits == 32:
        out.copy_(values.view(torch.uint8))
    else:
        most = float(MAX_BFLOAT16)
        out.copy_(values.clamp(-most, most).to(torch.bfloat16).view(torch.uint8))


def _read_values(how: ValueFormat, data: torch.Tensor, out: torch.Tensor) -> None:
    if isinstance(how, Levels):
        from ds_gradprune.native.device import levels

        levels.read(how.bits, how.shares, data, out)
    elif how.bits == 32:
        out.view(torch.uint8).copy_(data)
    else:
        out.copy_(data.clone().view(torch.bfloat16))  # a copy lies at an even address


def _streams(
    layout: BucketLayout, k: int, where: torch.Tensor
) -> Iterator[tuple[Group, Code, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For rows of every shape: their code, first kept elements, lower and upper parts."""
    from ds_gradprune.native.device.places import Code

    for number, group in enumerate(groups(layout, k)):
        code, split = group.code, group.code.low_bytes(group.num_rows)
        fields = (code.row_numel, code.row_kept, code.low_bits, code.row_bits, code.run_length)
        starts = _kept_starts(layout, k, number, where.device)
        yield group, Code(*fields), starts, where[:split], where[split : group.nbytes]
        where = where[group.nbytes :]


def _kept_starts(layout: BucketLayout, k: int, number: int, device: torch.device) -> torch.Tensor:
    """(rows,) int64: the first kept element of every row of a group; kept with the layout."""

    def make() -> torch.Tensor:
        starts = [
            torch.arange(run.num_rows, dtype=torch.int64) * run.row_kept + run.kept_start
            for run in groups(layout, k)[number].runs
        ]
        return torch.cat(starts).to(device)

    return layout.derived(("device group", k, number, device), make)
