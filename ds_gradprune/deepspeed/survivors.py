"""Islands that may be lost while a run goes on, with `min_islands`: who may, and how they begin."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import torch.distributed as dist

from ds_gradprune.config import BLOCK, GradientPruningConfig
from ds_gradprune.deepspeed.groups import Groups
from ds_gradprune.errors import UnsupportedError
from ds_gradprune.wire.crew import CrewTransport
from ds_gradprune.wire.epochs import gloo_opener
from ds_gradprune.wire.members import Epoch, Members
from ds_gradprune.wire.transport import Transport

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


def tell_lost(before: tuple[int, ...], after: tuple[int, ...], step: int, least: int) -> None:
    """Warn of islands that are gone. Local."""
    lost = [str(island) for island in before if island not in after]
    logger.warning(
        "step %d: island%s %s did not answer and %s left out; %d go on (gradient_pruning."
        "min_islands %d). Start all again with --resume to have %s back.",
        step,
        "" if len(lost) == 1 else "s",
        ", ".join(lost),
        "is" if len(lost) == 1 else "are",
        len(after),
        least,
        "it" if len(lost) == 1 else "them",
    )
