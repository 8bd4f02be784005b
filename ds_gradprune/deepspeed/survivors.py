"""Islands that may be lost while a run goes on, with `min_islands`: who may, and how they begin."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from ds_gradprune.config import BLOCK, GradientPruningConfig
from ds_gradprune.deepspeed.agree import Facts, check_beside, facts_text
from ds_gradprune.deepspeed.checkpoint import Seat
from ds_gradprune.deepspeed.groups import Groups
from ds_gradprune.errors import UnsupportedError
from ds_gradprune.train.crc import crc_of
from ds_gradprune.train.piece import Shards
from ds_gradprune.wire.bounded import Bounded
from ds_gradprune.wire.crew import CrewTransport
from ds_gradprune.wire.epochs import gloo_opener
from ds_gradprune.wire.members import Epoch, Members
from ds_gradprune.wire.stand_in import CREW, joined_store
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


def with_rest(facts: Facts, module: torch.nn.Module, shards: Shards, groups: Groups) -> Facts:
    """Facts of an engine, with what else an island that comes back must have. Local.

    What is never exchanged is not handed over: its hash is compared.
    """
    rest = shards.rest()
    frozen = [p for p in module.parameters() if not p.requires_grad and not hasattr(p, "ds_tensor")]
    crc = crc_of([*rest.sharded, *rest.whole, *frozen])
    more = {"weights that are not trained": f"{crc:08x}", "islands": str(groups.num_islands)}
    return Facts({**facts.values, **more}, facts.lists)


def make_crew(
    config: GradientPruningConfig,
    groups: Groups,
    wrap: Callable[[Transport], Transport],
    facts: Facts,
) -> CrewTransport:
    """A transport between islands of which some may be lost.

    Args:
        config: with `min_islands`.
        groups: the islands; one rank each.
        wrap: what an epoch's transport is put into, an emulated link perhaps.
        facts: what must be equal on all; the store keeps them for islands that come back.

    Returns:
        One that has begun; or must `join`, where this process comes in the place of a lost one.

    Raises:
        RankMismatchError: this one does not fit into the run.

    Collective: all ranks; local, where it must join.
    """
    assert config.min_islands is not None
    store = joined_store()
    if store is not None:
        check_beside(facts, Bounded(store).get("facts"))
    else:
        world = dist.distributed_c10d._get_default_store()
        store = dist.PrefixStore(f"{CREW}/{next(_numbers)}", world)  # type: ignore[attr-defined]
    opens = gloo_opener(store, groups.island, config.timeout_s)

    def opens_wrapped(epoch: Epoch) -> Transport:
        return wrap(opens(epoch))

    members = Members(store, groups.island, opens_wrapped, config.timeout_s, config.min_islands)
    if joined_store() is None:
        if groups.island == 0:
            Bounded(store).set("facts", facts_text(facts))
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

    def is_first(self, step: int) -> bool:
        """Tell of islands that are gone, or back; whether this one does what is done once. Local.

        Args:
            step: that the last exchange followed.
        """
        now = self._crew.took_part
        # A newcomer has seen nobody before.
        before = self._before or tuple(i for i in now if i != self._crew.rank)
        self._before = now
        lost = ", ".join(str(island) for island in before if island not in now)
        back = ", ".join(str(island) for island in now if island not in before)
        if lost and self._crew.place == 0:
            logger.warning(
                "step %d: %d go on without island %s, which did not answer (gradient_pruning."
                "min_islands %d). Start its ranks again with the same command to have it back.",
                step,
                len(now),
                lost,
                self._least,
            )
        if back and self._crew.place == 0:
            logger.warning("step %d: island %s takes part again: %d train", step, back, len(now))
        return self._crew.place == 0

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
