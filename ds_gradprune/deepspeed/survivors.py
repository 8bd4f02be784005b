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
from ds_gradprune.wire.alike import Alike
from ds_gradprune.wire.bounded import Bounded
from ds_gradprune.wire.crew import CrewTransport
from ds_gradprune.wire.epochs import gloo_opener
from ds_gradprune.wire.everyone import Everyone
from ds_gradprune.wire.fate import Fate, store_of
from ds_gradprune.wire.members import Epoch, Members
from ds_gradprune.wire.patient import Patient
from ds_gradprune.wire.stand_in import CREW, joined_store, life
from ds_gradprune.wire.torchdist import TorchDistTransport
from ds_gradprune.wire.transport import Transport

T = TypeVar("T")

logger = logging.getLogger(__name__)

_numbers = itertools.count()
"""Engines of a process, each with islands of its own."""


def refuse_unfit(config: GradientPruningConfig, groups: Groups) -> None:
    """Where no island can be lost. Local, the same on all ranks.

    Raises:
        UnsupportedError: these.
    """
    field, least = f"{BLOCK}.min_islands", config.min_islands
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


@dataclasses.dataclass(frozen=True)
class Survivors:
    """How a rank reaches the others, of which some may be lost.

    Attributes:
        crew: the ranks of its index on all islands.
        everyone: all ranks.
        inside: the ranks of its island; None: there is one.
    """

    crew: CrewTransport
    everyone: Everyone
    inside: Transport | None


def make_survivors(
    config: GradientPruningConfig,
    groups: Groups,
    wrap: Callable[[Transport], Transport],
    facts: Facts,
) -> Survivors:
    """Transports between islands of which some may be lost.

    Args:
        config: with `min_islands`.
        groups: the islands.
        wrap: what an epoch's transport is put into, an emulated link perhaps.
        facts: what must be equal on all; the store keeps them for islands that come back.

    Returns:
        They have begun; or must `join`, where this process comes in the place of a lost one.

    Raises:
        RankMismatchError: this one does not fit into the run.

    Collective: all ranks; local, where it must join.
    """
    assert config.min_islands is not None
    run, shard = joined_store(), groups.shard
    if run is None:
        world = dist.distributed_c10d._get_default_store()
        run = dist.PrefixStore(f"{CREW}/{next(_numbers)}", world)  # type: ignore[attr-defined]
    store = store_of(run, shard)
    if joined_store() is not None:
        check_beside(facts, Bounded(store).get("facts"))
    opens = gloo_opener(store, groups.island, config.timeout_s)

    def opens_wrapped(epoch: Epoch) -> Transport:
        return wrap(opens(epoch))

    fate = Fate(Bounded(run), shard, groups.num_shards)
    limits = (config.timeout_s, config.min_islands)
    members = Members(store, groups.island, opens_wrapped, *limits, fate=fate, life=life())
    told, inside = (_inside(groups, members) for _ in range(2))
    if joined_store() is None:
        if groups.island == 0:
            Bounded(store).set("facts", facts_text(facts))
            Bounded(store).set("shards", str(groups.num_shards))
        members.begin(range(groups.num_islands))
    alike = None if told is None else Alike(told, groups.num_islands, config.min_islands)
    crew = CrewTransport(members, alike)
    return Survivors(crew, Everyone(crew, told), inside)


def _inside(groups: Groups, members: Members) -> Transport | None:
    """A way of its own to the other ranks of the island, which may be late. Collective."""
    if groups.num_shards == 1:
        return None
    group = groups.new_inner(members.patience_s)
    return Patient(TorchDistTransport(group, members.patience_s), members)


class Roll:
    """Who is left, as one engine has seen it.

    Args:
        everyone: all ranks that are left.
        least: `min_islands`, for messages.
    """

    def __init__(self, everyone: Everyone, least: int) -> None:
        self._everyone = everyone
        self._least = least
        self._before = everyone.islands

    def is_first(self, step: int) -> bool:
        """Tell of islands that are gone, or back; whether this one does what is done once. Local.

        Args:
            step: that the last exchange followed.
        """
        now, is_first = self._everyone.islands, self._everyone.place == 0
        # A newcomer has seen nobody before.
        before = self._before or tuple(i for i in now if i != self._everyone.island)
        self._before = now
        lost = ", ".join(str(island) for island in before if island not in now)
        back = ", ".join(str(island) for island in now if island not in before)
        if lost and is_first:
            logger.warning(
                "step %d: %d go on without island %s, which did not answer (gradient_pruning."
                "min_islands %d). Start its ranks again with the same command to have it back.",
                step,
                len(now),
                lost,
                self._least,
            )
        if back and is_first:
            logger.warning("step %d: island %s takes part again: %d train", step, back, len(now))
        return is_first

    def save(self, seat: Seat, save: Callable[[Seat], T]) -> T:
        """Save again and again, until nobody was lost in it. Collective: those that are left.

        Args:
            seat: of this rank.
            save: as an island of those that are left.
        """
        there = self._everyone.roll()
        while True:
            island = there.index(self._everyone.island)
            result = save(dataclasses.replace(seat, island=island, num_islands=len(there)))
            before, there = there, self._everyone.roll()
            if there == before:
                return result
