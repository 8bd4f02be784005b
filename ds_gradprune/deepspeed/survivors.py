"""Islands that may be lost while a run goes on, with `min_islands`: who may, and how they begin."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ds_gradprune.config import BLOCK, GradientPruningConfig
from ds_gradprune.deepspeed.checkpoint import Seat
from ds_gradprune.deepspeed.groups import Groups
from ds_gradprune.errors import UnsupportedError
from ds_gradprune.wire.crew import CrewTransport
from ds_gradprune.wire.epochs import gloo_opener
from ds_gradprune.wire.members import Epoch, Members
from ds_gradprune.wire.transport import Transport

T = TypeVar("T")

logger = logging.getLogger(__name__)

_numbers = itertools.count()
"""Engines of a process, each with islands of its own."""


def refuse_unfit(config: GradientPruningConfig, groups: Groups) -> None:
    """Which islands cannot be lost one by one. Local, the same on all ranks.

    Raises:
        UnsupportedError: these.
    """
    field, least = f"{BLOCK}.min_islands", config.min_islands
    if groups.num_shards > 1:
        raise UnsupportedError(
            f"{field} must be null where an island has {groups.num_shards} ranks, got {least}: its "
            "ranks could not be lost together. Leave it out, or start one rank per host."
        )
    if least is not None and least > groups.num_islands:
        raise UnsupportedError(
            f"{field} must be at most the number of islands, {groups.num_islands}, got {least}."
        )
    if config.exchange_of(groups.num_islands) != "all_gather":
        raise UnsupportedError(
            f'{field} needs exchange = "all_gather", and with {groups.num_islands} islands "auto" '
            "is owner_reduce. Set exchange, or leave min_islands out."
        )


def make_crew(
    config: GradientPruningConfig, groups: Groups, wrap: Callable[[Transport], Transport]
) -> CrewTransport:
    """A transport between islands of which some may be lost.

    Args:
        config: with `min_islands`.
        groups: the islands; one rank each.
        wrap: what an epoch's transport is put into, an emulated link perhaps.

    Collective: all ranks.
    """
    assert config.min_islands is not None
    world = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore(f"ds_gradprune/crew/{next(_numbers)}", world)  # type: ignore[attr-defined]
    opens = gloo_opener(store, groups.island, config.timeout_s)

    def opens_wrapped(epoch: Epoch) -> Transport:
        return wrap(opens(epoch))

    members = Members(store, groups.island, opens_wrapped, config.timeout_s, config.min_islands)
    members.begin(range(groups.num_islands))
    return CrewTransport(members)


class Roll:
    """Who is left, as one engine has seen it.

    Args:
        crew: the islands' transport.
        least: `min_islands`, for messages.
    """

    def __init__(self, crew: CrewTransport, least: int) -> None:
        self._crew = crew
        self._least = least
        self._before = crew.took_part

    def takes_over(self, step: int) -> bool:
        """Tell of islands that are gone; whether this one now does what is done once. Local.

        Args:
            step: that the last exchange followed.
        """
        before, self._before = self._before, self._crew.took_part
        if before == self._before or self._crew.place:
            return False
        lost = [str(island) for island in before if island not in self._before]
        logger.warning(
            "step %d: %d go on without island %s, which did not answer (gradient_pruning."
            "min_islands %d). Start all again with --resume to have it back.",
            step,
            len(self._before),
            ", ".join(lost),
            self._least,
        )
        return before[0] != self._crew.rank

    def save(self, seat: Seat, save: Callable[[Seat], T]) -> T:
        """Save again and again, until nobody was lost in it. Collective: those that are left.

        Args:
            seat: of this rank.
            save: as an island of those that are left.
        """
        there = self._crew.roll()
        while True:
            island = there.index(self._crew.rank)
            result = save(dataclasses.replace(seat, island=island, num_islands=len(there)))
            before, there = there, self._crew.roll()
            if there == before:
                return result
