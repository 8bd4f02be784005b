"""Islands as processes that lose one another, and find together again over gloo."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.errors import TransportError
from ds_gradprune.wire.epochs import gloo_opener
from ds_gradprune.wire.members import LeftOut, Members
from ds_gradprune.wire.transport import Transport

TIMEOUT_S, ANSWER_S = 2.0, 4.0


def gathered(transport: Transport | None, value: int) -> list[int]:
    """Everybody's value."""
    assert transport is not None
    out = torch.zeros(transport.world_size, 4, dtype=torch.uint8)
    transport.all_gather(torch.full((4,), value, dtype=torch.uint8), out)
    return out[:, 0].tolist()


def lose_and_find(port: int, absent: int) -> dict[str, Any]:
    """One island does not answer; the others go on, and let it in when it is back."""
    island = int(os.environ["RANK"])
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    members = Members(store, island, gloo_opener(store, island, TIMEOUT_S), ANSWER_S, least=2)
    members.begin(range(3))
    told: dict[str, Any] = {"first": gathered(members.transport, island)}
    if island == absent:
        while not store.check(["alone"]):
            time.sleep(0.05)
        try:
            members.regroup(1)
        except LeftOut as exc:
            told["left out"] = str(exc)
        epoch = members.ask_in(60.0)
    else:
        try:
            gathered(members.transport, island)
        except TransportError as exc:
            told["fault"] = str(exc)
        epoch = members.regroup(1)
        told["without"] = [list(epoch.islands), epoch.is_even]
        told["second"] = gathered(members.transport, island)
        store.set("alone", "")
        step, wishes = 1, list[int]()
        while not wishes:
            step += 1
            members.plan(step)
            gathered(members.transport, island)
            wishes = members.invited(step)
            time.sleep(0.02)
        epoch = members.regroup(step, wishes)
    told["with"] = [list(epoch.islands), epoch.steps[absent], epoch.is_even]
    told["third"] = gathered(members.transport, 10 + island)
    store.add("done", 1)
    while store.add("done", 0) < 3:  # the store's clients leave together
        time.sleep(0.05)
    return told
