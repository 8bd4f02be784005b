"""What every transport must do: one function per check, run on every rank.

A check asserts what a rank sees and returns it, so that the caller can compare the ranks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_gradprune.errors import TransportError
from ds_gradprune.wire.transport import Transport

MEGABYTES = 6 * 256 * 1024 + 13
"""More than is sent in one piece, and no whole number of pieces."""


def noise(seed: int, numel: int) -> torch.Tensor:
    """Random bytes, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (numel,), dtype=torch.uint8, generator=generator)


def gathers_in_rank_order(transport: Transport) -> list[Any]:
    """Row r holds rank r's bytes, for every r."""
    payload = torch.full((5,), 10 + transport.rank, dtype=torch.uint8)
    out = torch.zeros((transport.world_size, 5), dtype=torch.uint8)
    transport.all_gather(payload, out)
    assert out.tolist() == [[10 + r] * 5 for r in range(transport.world_size)]
    return out.tolist()


def gathers_megabytes(transport: Transport) -> list[Any]:
    """A payload that travels in pieces arrives whole."""
    out = torch.zeros((transport.world_size, MEGABYTES), dtype=torch.uint8)
    transport.all_gather(noise(transport.rank, MEGABYTES), out)
    for rank in range(transport.world_size):
        assert torch.equal(out[rank], noise(rank, MEGABYTES))
    return [int(out.sum(dtype=torch.int64))]


def exchanges_rows(transport: Transport) -> list[Any]:
    """Row r holds what rank r had for this rank."""
    me, world = transport.rank, transport.world_size
    send = torch.tensor([[10 * me + to] * 3 for to in range(world)], dtype=torch.uint8)
    out = torch.zeros_like(send)
    transport.all_to_all(send, out)
    assert out.tolist() == [[10 * r + me] * 3 for r in range(world)]
    return [world]


def exchanges_megabytes(transport: Transport) -> list[Any]:
    """Rows that travel in pieces arrive whole."""
    me, world = transport.rank, transport.world_size
    send = torch.stack([noise(100 * me + to, MEGABYTES) for to in range(world)])
    out = torch.zeros_like(send)
    transport.all_to_all(send, out)
    for rank in range(world):
        assert torch.equal(out[rank], noise(100 * rank + me, MEGABYTES))
    return [world]


def empty_payload(transport: Transport) -> list[Any]:
    """No bytes are a payload too."""
    out = torch.zeros((transport.world_size, 0), dtype=torch.uint8)
    transport.all_gather(torch.zeros(0, dtype=torch.uint8), out)
    transport.all_to_all(torch.zeros_like(out), out)
    return out.tolist()


def sums_in_place(transport: Transport) -> list[Any]:
    """The dense path: small integers, so every order of addition gives the same bits."""
    vector = torch.arange(6, dtype=torch.float32).view(2, 3) * (transport.rank + 1)
    transport.all_reduce(vector)
    factor = sum(r + 1 for r in range(transport.world_size))
    assert torch.equal(vector, torch.arange(6, dtype=torch.float32).view(2, 3) * factor)
    return vector.tolist()


def buffers_are_reusable(transport: Transport) -> list[Any]:
    """After the wait the payload belongs to the caller again: overwrite it, nobody notices."""
    payload = torch.empty(3, dtype=torch.uint8)
    seen = []
    for turn in range(4):
        payload.fill_(turn * 10 + transport.rank)
        out = torch.zeros((transport.world_size, 3), dtype=torch.uint8)
        transport.all_gather(payload, out)
        payload.fill_(255)
        seen.append(out[:, 0].tolist())
    assert seen == [[t * 10 + r for r in range(transport.world_size)] for t in range(4)]
    return seen


def calls_overlap(transport: Transport) -> list[Any]:
    """Several calls under way, of all kinds; waited for twice, and in another order."""
    me, world = transport.rank, transport.world_size
    payload = torch.full((2,), me, dtype=torch.uint8)
    gathered = torch.zeros((world, 2), dtype=torch.uint8)
    rows = torch.full((world, 1), me + 1, dtype=torch.uint8)
    received = torch.zeros_like(rows)
    total = torch.full((4,), float(me))
    works = [
        transport.start_all_gather(payload, gathered),
        transport.start_all_to_all(rows, received),
        transport.start_all_reduce(total),
    ]
    for work in [*reversed(works), *works]:
        work.wait()
        assert work.done()
    assert gathered.tolist() == [[r] * 2 for r in range(world)]
    assert received.tolist() == [[r + 1] for r in range(world)]
    assert total.tolist() == [float(sum(range(world)))] * 4
    return [gathered.tolist(), total.tolist()]


def strided_buffers_are_refused(transport: Transport) -> list[Any]:
    """Libraries read a view's memory as if it were whole, so a view is refused on every rank."""
    world = transport.world_size
    wide = torch.zeros((world, 8), dtype=torch.uint8)
    with pytest.raises(ValueError, match="payload must be a contiguous uint8 tensor of shape"):
        transport.start_all_gather(wide[0, ::2], wide[:, :4].contiguous())
    with pytest.raises(ValueError, match="out must be a contiguous uint8 tensor of shape"):
        transport.start_all_gather(wide[0, :3], wide)
    with pytest.raises(ValueError, match="send must be a contiguous uint8 tensor of shape"):
        transport.start_all_to_all(torch.zeros((world + 1, 8), dtype=torch.uint8), wide)
    with pytest.raises(ValueError, match=r"tensor must be contiguous.*tensor.contiguous\(\)"):
        transport.start_all_reduce(torch.zeros(2, 3).t())
    return sums_in_place(transport)


def closed_says_so(transport: Transport) -> list[Any]:
    """The last check of a transport: after `close`, twice, nothing starts."""
    transport.close()
    transport.close()
    with pytest.raises(TransportError, match="transport is closed"):
        transport.start_all_gather(
            torch.zeros(1, dtype=torch.uint8),
            torch.zeros((transport.world_size, 1), dtype=torch.uint8),
        )
    return []


CHECKS = (
    "gathers_in_rank_order",
    "gathers_megabytes",
    "exchanges_rows",
    "exchanges_megabytes",
    "empty_payload",
    "sums_in_place",
    "buffers_are_reusable",
    "calls_overlap",
    "strided_buffers_are_refused",
    "closed_says_so",
)
"""All of them; `closed_says_so` last."""


def run_check(name: str, transport: Transport) -> list[Any]:
    """Run one check."""
    found: list[Any] = globals()[name](transport)
    return found
