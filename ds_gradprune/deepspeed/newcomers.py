"""A lost island that comes back: what it is handed over, and how it takes it up.

It takes from the first of the other islands what is equal on all of them: shared weights, law,
counters, slow momentum. Of what each island has for itself it takes that island's, too: moments,
loss scale, schedule and buffers. It has learned nothing yet, so its own weights are the shared ones
and its residual is empty.

All islands come here before the same step, because the headers of an exchange before have told that
one asks.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import torch

from ds_gradprune.errors import CheckpointError
from ds_gradprune.train.parcel import Parcel, opened, readable
from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.carry import hand_over, receive
from ds_gradprune.wire.fate import left_out

if TYPE_CHECKING:
    from ds_gradprune.deepspeed.island_handle import IslandHandle

_COUNTS = ("global_steps", "global_samples", "micro_steps")
"""Of DeepSpeed's engine (0.19.8, runtime/engine.py)."""


_TEXT_BYTES, _MOST_PER_ELEMENT = 2**26, 64
"""No run hands over more: numbers and names, and tensors for each weight in fp64."""


def let_in(handle: IslandHandle) -> None:
    """Let in the island that asks, between two steps; whoever is lost meanwhile, the others go on.

    Collective: all islands, at the same step.
    """
    assert handle.crew is not None
    handle.weights.hold_own()
    newcomer = handle.crew.let_in()
    handle.lets_in = False  # an exchange that has landed just now may have said it once more
    if newcomer is None:
        return
    if newcomer.here:
        make = _parcel if newcomer.everywhere else _refusal
        hand_over(handle.crew.crew, newcomer.island, lambda: make(handle))
    handle.crew.roll()


def join(handle: IslandHandle) -> Any:
    """Take part in the run from its next step on.

    Returns:
        What the other islands' script tells, see `IslandHandle.tells`.

    Raises:
        CheckpointError: what was handed over does not fit this engine.
        TransportError, TransportTimeout: the run is over, or cannot be reached.

    Collective: all islands, which call `let_in`.
    """
    assert handle.crew is not None
    with handle.inside.together():
        state, crc, told = _received(handle)
    with handle.inside.together():
        _take(handle, state)
        if handle.parameters_crc() != crc:
            raise CheckpointError(
                f"the weights that island {handle.groups.island} was handed over must be those of "
                "the run, but their checksums differ. Start it again; test the memory of its host."
            )
    if handle.groups.island not in handle.crew.roll():
        raise left_out(handle.groups.island)
    return told


def _received(handle: IslandHandle) -> tuple[dict[str, Any], int, Any]:
    """The state, the checksum of its weights, and what a script is told."""
    assert handle.crew is not None
    crew = handle.crew.crew
    crew.join()
    state: dict[str, Any] = opened(*receive(crew, _most_bytes(handle.engine.module)))
    with readable():
        crc, told = (0, None) if "fault" in state else (int(state["crc"]), state["told"])
    if "fault" in state:
        raise CheckpointError(state["fault"])
    return state, crc, told


def _refusal(handle: IslandHandle) -> Parcel:
    return Parcel(
        {
            "fault": f"all {handle.groups.num_shards} ranks of an island must be let in together, "
            "but another one of this island was not reached. Start all of them again."
        }
    )


def _most_bytes(module: torch.nn.Module) -> int:
    tensors = itertools.chain(module.parameters(), module.buffers())
    elements = sum(int(getattr(tensor, "ds_numel", tensor.numel())) for tensor in tensors)
    return _TEXT_BYTES + _MOST_PER_ELEMENT * elements


def _parcel(handle: IslandHandle) -> Parcel:
    try:
        return Parcel(_state(handle))
    except CheckpointError as exc:  # the newcomer tells it, the others go on
        return Parcel({"fault": str(exc)})


def _state(handle: IslandHandle) -> dict[str, Any]:
    islands = handle.islands
    agreed = {
        repr(piece.key): islands.weights.shared(piece) if islands.have_parted else piece.own
        for piece in islands.weights.known()
    }
    return {
        "loop": handle.loop.state_dict(),
        "rounds": handle.rounds.state_dict(),
        "channel": handle.channel.state_dict(),
        "island": handle.state_of.save() | {"own": agreed, "kept": None},
        "counts": {name: getattr(handle.engine, name) for name in _COUNTS},
        "crc": handle.parameters_crc(),
        "told": handle.tells(),
    }


def _take(handle: IslandHandle, state: dict[str, Any]) -> None:
    """Check everything, then put it into force."""
    measured = Stopwatch(lambda: 0.0).state_dict()  # this island has measured nothing yet
    with readable():
        loop = dataclasses.replace(handle.loop.read(state["loop"]), stopwatch=measured)
        handle.channel.check_state(state["channel"])
        restore = handle.state_of.read(state["island"])
    handle.islands.weights.set_own(state["island"]["own"])
    restore()
    handle.loop.take(loop)
    handle.channel.load_state_dict(state["channel"])
    handle.rounds.load_state_dict(state["rounds"])
    handle.losses.reset()
    for name, count in state["counts"].items():
        setattr(handle.engine, name, count)
    handle.weights.note()
