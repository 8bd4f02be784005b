"""The ranks of a lost island meet before they ask to be let in: an island comes back whole.

::

    lead/island             the ticket of the island's new life, from its rank of index 0
    comes/ticket/shard      counted up by each rank that has come
    met/ticket              all have come

A ticket is new for every life. So ranks of two lives are never taken for one island.
"""

from __future__ import annotations

import time

from ds_gradprune.errors import TransportTimeout
from ds_gradprune.wire.bounded import Bounded
from ds_gradprune.wire.door import ASK_S, Candidate


def meet(store: Bounded, island: int, shard: int, num_shards: int, patience_s: float) -> str:
    """Wait for the other ranks of this island.

    Args:
        store: that all ranks of the run share.
        island: its number.
        shard: index of this rank inside it.
        num_shards: its ranks.
        patience_s: so long the others may take.

    Returns:
        The ticket of this life of the island, equal on its ranks.

    Raises:
        TransportTimeout: names who did not come.

    Collective: the ranks of the island.
    """
    mine = Candidate(island).ticket
    if num_shards == 1:
        return mine
    if shard == 0:
        store.set(f"lead/{island}", mine)
    missing, seen, deadline_s = [0], dict[int, str](), time.monotonic() + patience_s
    came = ""
    while time.monotonic() < deadline_s:
        ticket = mine if shard == 0 else store.text(f"lead/{island}")
        if ticket and (came == ticket or not store.check([f"met/{ticket}"])):
            came = ticket
            store.add(f"comes/{ticket}/{shard}", 1)
            if shard == 0:
                missing = _missing(store, ticket, num_shards, seen)
                if not missing:
                    store.set(f"met/{ticket}", "")
            if store.check([f"met/{ticket}"]):
                return ticket
        time.sleep(ASK_S)
    who = f"rank{'' if len(missing) == 1 else 's'} {', '.join(map(str, missing))}"
    raise TransportTimeout(
        f"island {island} must come back with all its {num_shards} ranks, but its {who} did not "
        f"come within {patience_s:g} s (gradient_pruning.timeout_s). Start all of them again with "
        "the same command; the other islands train on meanwhile."
    )


def _missing(store: Bounded, ticket: str, num_shards: int, seen: dict[int, str]) -> list[int]:
    """Indices whose ranks have not been seen twice: one that has ended counts no more. Local."""
    missing = []
    for shard in range(1, num_shards):
        count = store.text(f"comes/{ticket}/{shard}")
        if not count or seen.setdefault(shard, count) == count:
            missing.append(shard)
    return missing
