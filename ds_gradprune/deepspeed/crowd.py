"""A warning where several islands share the link of one host."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_gradprune.deepspeed.seats import Seat

logger = logging.getLogger(__name__)

CROWDED = (
    "the {ranks} ranks of a host form {islands} islands, and each sends its own exchange over the "
    "network: the host's link carries {islands} times as much. Leave gradient_pruning.island.ranks "
    "out, and they form one."
)


def warn_of_crowd(seats: Sequence[Seat], ranks_per_island: int) -> None:
    """Log what `crowd` finds. Local."""
    text = crowd(seats, ranks_per_island)
    if text is not None:
        logger.warning(text)


def crowd(seats: Sequence[Seat], ranks_per_island: int) -> str | None:
    """What to warn of; None where each host is an island, or all are on one host. Pure.

    Args:
        seats: one per rank, in rank order.
        ranks_per_island: consecutive ranks that form one.
    """
    num_hosts = sum(seat.local_rank == 0 for seat in seats)
    most = 1 + max(seat.local_rank for seat in seats)
    if num_hosts < 2 or most <= ranks_per_island:
        return None
    return CROWDED.format(ranks=most, islands=-(-most // ranks_per_island))
