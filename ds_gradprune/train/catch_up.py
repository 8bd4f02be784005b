"""Brings islands up to date that have missed exchanges: from a peer, to the bit.

An island that was away, and one whose last exchange failed while others could apply it, take the
shared weights, the outer rule's state and the loop's from a peer. What they have beyond the shared
weights stays theirs: own - shared is what it was, less what the others have already applied of it.
"""

from __future__ import annotations

import json

import torch

from ds_gradprune.errors import UnsupportedError
from ds_gradprune.train.islands import Islands, Prepared
from ds_gradprune.train.loop import Loop
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.members import Epoch
from ds_gradprune.wire.transport import Transport


@torch.no_grad()
def catch_up(
    islands: Islands,
    loop: Loop,
    transport: Transport,
    epoch: Epoch,
    scale: float,
    failed: Prepared | None = None,
) -> None:
    """Go on in an epoch with the same shared weights as everybody.

    Args:
        islands: the algorithm; it exchanges over `transport` from now on.
        loop: its loop; takes the peer's state where this island is behind.
        transport: of the epoch.
        epoch: see there.
        scale: factor on the islands' mean update, for their number now.
        failed: the exchange of the epoch before that this island could not finish, while some other
            has applied it; None: there is none, or this island was away when it happened.

    Raises:
        TransportError: a peer was lost meanwhile; the shared weights may be half taken over, so
            this island must be behind in the next epoch.
        UnsupportedError: the islands exchange by owners.

    Collective: all islands of the epoch.
    """
    if not isinstance(islands.channel, AllGather):
        raise UnsupportedError(
            "islands that may leave and join exchange with all_gather, because owners divide the "
            "weights by the number of islands. Set gradient_pruning.exchange to all_gather."
        )
    place = transport.rank
    done = [epoch.steps[island] for island in epoch.islands]
    source = done.index(max(done))
    is_behind = done[place] < done[source]
    if not epoch.is_even:
        before = [store.clone() for store in islands.weights.stores]
        given = [] if failed is None or not is_behind else [v.clone() for _, v in failed.given()]
        _hand_over(islands, loop, transport, source, is_behind)
        if is_behind:
            _move_own(islands, before, given)
    islands.channel = AllGather(transport)
    islands.scale = scale


def _hand_over(
    islands: Islands, loop: Loop, transport: Transport, source: int, is_behind: bool
) -> None:
    """Shared weights, outer rule and loop of the source, on all that are behind."""
    is_source = transport.rank == source
    text = json.dumps(loop.state_dict()).encode() if is_source else b""
    state = json.loads(_bytes_of(transport, text))
    for store in islands.weights.stores:
        store.copy_(_tensor_of(transport, store, is_source))
    drifts = islands.rule.state_dict()
    mine = drifts if isinstance(drifts, list) else []
    count = int(_bytes_of(transport, str(len(mine)).encode() if is_source else b""))
    found = [
        _tensor_of(transport, mine[i] if is_source else store, is_source)
        for i, store in enumerate(islands.weights.stores[:count])
    ]
    if is_behind:
        loop.take(loop.read(state))
        if isinstance(drifts, list):
            islands.rule.take(islands.rule.read(found))


def _move_own(islands: Islands, before: list[torch.Tensor], given: list[torch.Tensor]) -> None:
    """Own weights follow the shared ones; what was given and applied is no progress any more."""
    weights = islands.weights
    for number, bound in enumerate(weights.bound()):
        old = before[bound.store][bound.start : bound.stop]
        if islands.kept is not None and given:
            kept = islands.kept.of(bound, weights.stores[bound.store])
            islands.kept.gather(kept, bound, bound.own, old)
            kept.sub_(given[number])
            for own, part in zip(bound.own, bound.split(bound.shared), strict=True):
                own.copy_(part)
            continue
        move = torch.sub(bound.shared, old)
        if given:
            move.sub_(given[number])
        for own, part in zip(bound.own, bound.split(move), strict=True):
            own.add_(part)


def _tensor_of(transport: Transport, tensor: torch.Tensor, is_source: bool) -> torch.Tensor:
    """The source's tensor, bit for bit: its bits as whole numbers, to which others add zeros."""
    bits = tensor.detach().cpu().contiguous().view(torch.int32)
    bits = bits.clone() if is_source else torch.zeros_like(bits)
    transport.all_reduce(bits)
    return bits.view(torch.float32)


def _bytes_of(transport: Transport, data: bytes) -> bytes:
    """The source's bytes; the others bring none."""
    length = torch.tensor([len(data)], dtype=torch.int32)
    transport.all_reduce(length)
    padded = data.ljust(-(-int(length) // 4) * 4, b"\0")
    bits = torch.frombuffer(bytearray(padded), dtype=torch.int32).clone()
    transport.all_reduce(bits)
    return bytes(bits.view(torch.uint8).tolist())[: int(length)]
