"""Latency and rate between every two hosts, over agents on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ds_gradprune.commands.forecast import Link
from ds_gradprune.commands.hosts import Agent, Hosts
from ds_gradprune.law.stats import median

SECONDS = 1.5
"""Of one measurement of a rate."""

MANY = 4
"""Connections at once, where several are tried."""

WAIT_S = 60.0

LARGE_S = 0.5
"""A large message takes about so long."""

LEAST_BYTES, MOST_BYTES = 128 * 2**10, 64 * 2**20
"""Of a large message."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What lies between two hosts. Rates are megabit of payload per second.

    Attributes:
        here: one host.
        there: the other.
        latency_s: one way.
        to_mbit: from here to there, one connection.
        from_mbit: from there to here, one connection.
        many_mbit: the slower direction, several connections.
        both_mbit: the slower direction, while both carry one connection. An exchange does that.
    """

    here: str
    there: str
    latency_s: float
    to_mbit: float
    from_mbit: float
    many_mbit: float
    both_mbit: float


def measure(hosts: Hosts, tell: Callable[[str], object]) -> list[Pair]:
    """Every pair, one after the other.

    Args:
        hosts: with agents.
        tell: progress.

    Raises:
        TransportError: two hosts cannot reach each other.
    """
    addresses = [
        facts["address"] or agent.name
        for facts, agent in zip(hosts.facts, hosts.agents, strict=True)
    ]
    ports = hosts.together("listen")
    found = []
    numbers = list(itertools.combinations(range(len(hosts.agents)), 2))
    for one, other in numbers:
        here, there = hosts.agents[one], hosts.agents[other]
        tell(f"link {here.name} - {there.name}, about {5 * SECONDS:.0f} s")
        end = (addresses[other], ports[other])
        late_s, _ = _run(here, there, end)
        _, to_mbit = _run(here, there, end, sends=True)
        from_mbit, _ = _run(here, there, end, receives=True)
        _, to_many = _run(here, there, end, count=MANY, sends=True)
        from_many, _ = _run(here, there, end, count=MANY, receives=True)
        both = _run(here, there, end, sends=True, receives=True)
        found.append(
            Pair(
                here.name,
                there.name,
                late_s,
                to_mbit,
                from_mbit,
                min(to_many, from_many),
                min(both),
            )
        )
    return found


def _run(
    here: Agent,
    there: Agent,
    end: tuple[str, int],
    *,
    count: int = 1,
    sends: bool = False,
    receives: bool = False,
) -> tuple[Any, Any]:
    """One measurement; what arrived here, and what arrived there. Without both flags, latency."""
    what = {"count": count, "seconds": SECONDS}
    answering = there.order("accept", sends=receives, receives=sends, **what)
    result = here.ask(
        "connect", WAIT_S, host=end[0], port=end[1], sends=sends, receives=receives, **what
    )
    return result, there.answer(answering, WAIT_S)


def collectives(hosts: Hosts, rate_mbit: float) -> Link:
    """Time the product's own collectives between all hosts.

    Args:
        hosts: with agents.
        rate_mbit: of the slowest pair.

    Raises:
        TransportError: gloo cannot connect the hosts.
    """
    world_size = len(hosts.agents)
    num_bytes = int(rate_mbit * 125e3 * LARGE_S / (world_size - 1))
    num_bytes = max(LEAST_BYTES, min(MOST_BYTES, num_bytes)) // 4 * 4
    first = hosts.facts[0]["address"] or hosts.agents[0].name
    found = hosts.together(
        "collective",
        3 * WAIT_S,
        each=[{"rank": rank} for rank in range(world_size)],
        world_size=world_size,
        host=first,
        port=hosts.agents[0].ask("free_port"),
        num_bytes=num_bytes,
    )
    return Link(
        gather_call_s=_call_s([f["gathers_s"] for f in found]),
        reduce_call_s=_call_s([f["reduces_s"] for f in found]),
        gather_share=min(f["gather_mbit"] for f in found) / rate_mbit,
        reduce_share=min(f["reduce_mbit"] for f in found) / rate_mbit,
    )


def _call_s(times_s: Sequence[Sequence[float]]) -> float:
    """Seconds of a small collective. The last host to come to it waits for nobody."""
    return median([min(call) for call in zip(*times_s, strict=True)])
