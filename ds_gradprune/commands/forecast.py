"""What a step takes on a link, dense and pruned: arithmetic on measured costs. Pure.

A step is computation, codec, and an exchange: calls, whose latency no rate shortens, and bytes.
Bytes are those that one host sends, and it receives as many meanwhile.

    dense     compute + wait + call + dense bytes / rate
    pruned    compute + watch + (codec + exposed) / interval
    exposed   wait sqrt(interval) + 2 calls + pruned bytes / rate, less what the computation hides

Wait is for the slowest host: the spread of n steps grows with sqrt(n). Watch is what the plug-in
does in every step.

Rates are of payload. A rate that stands on a link's label carries `FRAME_SHARE` of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ds_gradprune.law.verdict import PAYS
from ds_gradprune.law.verdict import break_even_mbit as edge_mbit

FRAME_SHARE = 1448 / 1538
"""Payload of a full TCP segment over what it occupies on an Ethernet of MTU 1500: headers of TCP
with time stamps (32), IP (20) and Ethernet (18), preamble (8) and gap (12)."""

NEAR = 1.25
"""A setting is as good as the fastest if its step takes at most so many times as long. Of those the
one that sends most is recommended, because it loses least."""

ANNOUNCE_BYTES = 80
"""What a rank announces before its payload: header and sizes."""


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """What a user may choose.

    Attributes:
        density: kept / all elements.
        interval: optimizer steps per exchange, `sync_every`.
    """

    density: float
    interval: int = 1

    @property
    def name(self) -> str:
        """For a user and as a key: "1 % every 5 steps"."""
        often = "step" if self.interval == 1 else f"{self.interval} steps"
        return f"{100 * self.density:g} % every {often}"


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained.

    Attributes:
        numel: parameters that are trained.
        islands: hosts that exchange with each other.
        ranks: processes on all hosts together.
        compute_s: forward, backward and optimizer of a step, without any exchange.
        stage: of ZeRO.
        accumulation: micro-steps of a step.
        element_bytes: bytes of a gradient or weight in DeepSpeed's own collectives.
        tokens: of a step and island.
        watch_s: what the plug-in does besides in every step.
        wait_s: after a step, for the host that is the slowest in it (`wait_s`).
    """

    numel: int
    islands: int
    ranks: int
    compute_s: float
    stage: int = 0
    accumulation: int = 1
    element_bytes: int = 4
    tokens: int = 256
    watch_s: float = 0.0
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Link:
    """Between the hosts, without its rate.

    Attributes:
        gather_call_s: an all-gather of a few bytes.
        reduce_call_s: an all-reduce of a few bytes.
        gather_share: of the rate that an all-gather gets.
        reduce_share: of the rate that an all-reduce gets.
    """

    gather_call_s: float = 0.0
    reduce_call_s: float = 0.0
    gather_share: float = 1.0
    reduce_share: float = 1.0

    @classmethod
    def ideal(cls, latency_s: float, islands: int) -> Link:
        """Rings that get the whole rate: N - 1 hops to gather, 2 (N - 1) to sum."""
        hops = islands - 1
        return cls(hops * latency_s, 2 * hops * latency_s)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step costs, whatever the rate.

    Attributes:
        local_s: computation and codec.
        latency_s: waits that no rate shortens.
        wire_bytes: that the link has to carry, in units of its whole rate.
        hidden_s: so much of the exchange goes on behind the computation, if it takes so long.
    """

    local_s: float
    latency_s: float
    wire_bytes: float
    hidden_s: float = 0.0

    def exchange_s(self, rate_mbit: float) -> float:
        """Seconds of the exchange, hidden ones included."""
        return self.latency_s + 8e-6 * self.wire_bytes / rate_mbit

    def step_s(self, rate_mbit: float) -> float:
        """Seconds of a step on a link of this rate."""
        return self.local_s + max(0.0, self.exchange_s(rate_mbit) - self.hidden_s)


def wait_s(steps_s: Sequence[Sequence[float]]) -> float:
    """What hosts wait for each other after a step: mean of the slowest, less the slowest mean.

    Args:
        steps_s: measured steps of every host, each one's drawn independently of the others'.
    """
    every_s = sorted(time_s for own_s in steps_s for time_s in own_s)
    slowest_s = below = 0.0
    for time_s in every_s:
        # All hosts are done by then: a product of what each one's steps say.
        done = math.prod(sum(own <= time_s for own in own_s) / len(own_s) for own_s in steps_s)
        slowest_s += (done - below) * time_s
        below = done
    return max(0.0, slowest_s - max(fmean(own_s) for own_s in steps_s))


def dense_bytes(job: Job) -> float:
    """Bytes that one host sends in a step of DeepSpeed alone.

    Stages 0 and 1 sum gradients once a step, stage 2 after every micro-step. Stage 3 gathers the
    weights for every forward and backward besides.

    References:
        Rajbhandari et al., ZeRO, SC 2020, section 7 (volumes of the stages).
    """
    ring = (job.ranks - 1) / job.ranks * job.numel * job.element_bytes
    if job.stage == 3:
        return 3 * job.accumulation * ring
    return (job.accumulation + 1) * ring if job.stage == 2 else 2 * ring


def dense_cost(job: Job, link: Link) -> Cost:
    """A step of DeepSpeed alone."""
    latency_s = link.reduce_call_s * (job.accumulation if job.stage > 1 else 1)
    return Cost(job.compute_s, job.wait_s + latency_s, dense_bytes(job) / link.reduce_share)


def exchange_bytes(payload_bytes: int, islands: int, *, owners: bool = False) -> float:
    """Bytes that one host sends in a pruned exchange, announcement included.

    Args:
        payload_bytes: of all its buckets.
        islands: N, >= 1.
        owners: False: all-gather, N - 1 payloads. True: owner-reduce, 2 (N - 1) / N of one.
    """
    copies = 2 * (islands - 1) / islands if owners else islands - 1
    return copies * payload_bytes + (islands - 1) * ANNOUNCE_BYTES


def pruned_cost(
    job: Job,
    link: Link,
    interval: int,
    *,
    codec_s: float,
    wire_bytes: float,
    delay_steps: int = 0,
) -> Cost:
    """A step of islands, an exchange spread over its interval.

    Args:
        job: what is trained.
        link: between the hosts.
        interval: optimizer steps per exchange.
        codec_s: select, encode, decode, apply; of one exchange.
        wire_bytes: that one host sends in one exchange.
        delay_steps: steps of computation that it may hide behind.
    """
    latency_s = math.sqrt(interval) * job.wait_s
    latency_s += 2 * link.gather_call_s  # announcement and payloads
    return Cost(
        job.compute_s + job.watch_s + codec_s / interval,
        latency_s / interval,
        wire_bytes / link.gather_share / interval,
        delay_steps * job.compute_s / interval,
    )


def break_even_mbit(dense: Cost, pruned: Cost) -> float | None:
    """The rate below which the pruned step is faster; 0.0: at none; None: at every rate."""
    extra_s = pruned.local_s - dense.local_s - dense.latency_s
    late_s = pruned.latency_s - pruned.hidden_s
    edge = edge_mbit(extra_s + late_s, dense.wire_bytes - pruned.wire_bytes)
    if edge == 0.0 or (edge is not None and pruned.exchange_s(edge) > pruned.hidden_s):
        return edge
    if edge is None and not pruned.hidden_s:
        return None
    return edge_mbit(extra_s, dense.wire_bytes)  # at that rate the whole exchange is hidden


def pays(dense: Cost, pruned: Cost, rate_mbit: float) -> bool:
    """A pruned step takes at most `PAYS` of a dense one."""
    return pruned.step_s(rate_mbit) <= PAYS * dense.step_s(rate_mbit)


def recommend(dense: Cost, pruned: Mapping[Setting, Cost], rate_mbit: float) -> Setting | None:
    """The setting to begin with on a link of this rate; None: stay dense.

    Among those that pay and are near the fastest, the one that sends most bytes a step; among equal
    ones the shorter interval.
    """
    paying = [s for s, cost in pruned.items() if pays(dense, cost, rate_mbit)]
    if not paying:
        return None
    most_s = NEAR * min(pruned[s].step_s(rate_mbit) for s in paying)
    near = [s for s in paying if pruned[s].step_s(rate_mbit) <= most_s]
    return max(near, key=lambda s: (pruned[s].wire_bytes, -s.interval))


def payload_mbit(nominal_mbit: float) -> float:
    """What a link of this nominal rate carries of payload."""
    return FRAME_SHARE * nominal_mbit


def settings(densities: Sequence[float], intervals: Sequence[int]) -> list[Setting]:
    """All combinations, intervals outside."""
    return [Setting(density, interval) for interval in intervals for density in densities]
