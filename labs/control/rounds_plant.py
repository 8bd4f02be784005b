"""Islands that a law steers: the same hosts and links, with an exchange every few steps.

What a law may choose here is a density and an interval. An exchange is begun after the interval's
last step, and, where it hides, it lands a quarter of the interval later; the hosts compute on
meanwhile. A kept element takes 4 bits and its index, log2(1 / density) + 1.5 bits, so the law's
straight line through the bytes is right at one density alone. The oracle knows every rate
beforehand: it takes the shortest interval, from four steps on, at which 3 % fit, and what fits
there at two standard deviations.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ds_gradprune import law as control
from ds_gradprune.bucket.layout import CHUNK_NUMEL, kept_per_chunk
from ds_gradprune.config import INTERVALS, DensityConfig, GradientPruningConfig
from ds_gradprune.law.consensus import aggregate
from ds_gradprune.law.interval import EASIEST, FLOOR
from ds_gradprune.law.signals import RankSignals, StepSignals
from ds_gradprune.wire.traffic import all_gather_bytes, ring_all_reduce_bytes
from labs.control import traces
from labs.control.plant import (
    BUDGET_S,
    CODEC_S,
    COMPUTE_NOISE,
    COMPUTE_S,
    DENSE_SEGMENT_BYTES,
    K_MAX,
    K_MIN,
    NUMEL,
    OVERHEAD_S,
)
from labs.control.traces import Trace

STRETCH = 16
"""Traces are so much longer: a rate holds for 1,600 to 4,000 steps, 50 to 1,000 exchanges."""

RATE_SHARE = 0.1
"""Links are slower by so much: 5 to 400 Mbit/s, those of homes and of shared networks."""

LAWS: dict[str, dict[str, Any]] = {
    "auto, hidden": {"sync_every": "auto", "overlap": "auto"},
    "auto, waited for": {"sync_every": "auto"},
    "every step, hidden": {"sync_every": 1, "overlap": "auto"},
    "every 4, hidden": {"sync_every": 4, "overlap": "auto"},
    "every 16, hidden": {"sync_every": 16, "overlap": "auto"},
    "every 16, waited for": {"sync_every": 16},
}


def config_of(name: str) -> GradientPruningConfig:
    """The product's block of one law."""
    return GradientPruningConfig(
        prune="update",
        warmup="dense",
        warmup_steps=20,
        ramp_steps=40,
        step_time_budget_s=BUDGET_S,
        density=DensityConfig(initial=0.03, min=K_MIN / CHUNK_NUMEL, max=K_MAX / CHUNK_NUMEL),
        **LAWS[name],
    )


def wire_bytes(k: int, hosts: int) -> int:
    """What one host sends with k kept elements per chunk; CHUNK_NUMEL: dense."""
    if k == CHUNK_NUMEL:
        return 64 * (hosts - 1) + ring_all_reduce_bytes(4 * NUMEL, hosts)
    bits = 4.0 + math.log2(CHUNK_NUMEL / k) + 1.5
    kept = NUMEL // CHUNK_NUMEL * k
    return all_gather_bytes(64 + DENSE_SEGMENT_BYTES + int(kept * bits / 8), hosts)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One exchange as it passed.

    Attributes:
        step: the last step before it, counted from 0.
        interval: steps since the exchange before.
        density: kept / all.
        step_s: what each of these steps took.
        oracle_s: what a step took the oracle, with the same chance.
        oracle_share: the oracle's elements per step, as a share of all.
        oracle_interval: the oracle's interval.
    """

    step: int
    interval: int
    density: float
    step_s: float
    oracle_s: float
    oracle_share: float
    oracle_interval: int

    @property
    def share(self) -> float:
        """Elements per step, as a share of all."""
        return self.density / self.interval


class Passed(NamedTuple):
    """An exchange as the next one's signals tell of it.

    Attributes:
        interval: steps since the exchange before it; `k`: kept elements per chunk.
        comm_s: the exchange itself; `computes_s`: every host's computation of these steps.
    """

    interval: int
    k: int
    comm_s: float
    computes_s: list[float]


class Plant:
    """One run, exchange by exchange; chance is the same for every law.

    Args:
        trace: the link.
        hosts: how many.
        seed: of chance.
    """

    def __init__(self, trace: Trace, hosts: int, seed: int) -> None:
        rng = np.random.default_rng([seed, hosts, *trace.name.encode()])
        steps = len(trace.rates)
        wire = np.exp(trace.noise * rng.standard_normal(steps))
        times = rng.uniform(min(2.0, trace.outlier_most / 2.0), trace.outlier_most, steps)
        self._wire = np.where(rng.random(steps) < trace.outliers, wire * times, wire)
        compute_s = COMPUTE_S * np.exp(COMPUTE_NOISE * rng.standard_normal((steps, hosts)))
        late = rng.random(steps) < trace.stragglers
        who, by = rng.integers(0, hosts, steps), rng.uniform(1.3, 2.5, steps)
        compute_s[np.arange(steps), who] *= np.where(late, by, 1.0)
        # Hosts meet at exchanges alone, so each one's sum over the interval counts.
        self._sums_s = np.vstack([np.zeros(hosts), np.cumsum(compute_s, axis=0)])
        self._stall_s = np.zeros(steps)
        for step, time_s in trace.stalls:
            self._stall_s[step] += time_s
        self.trace, self.hosts = trace, hosts
        self._oracle: dict[tuple[float, bool], tuple[int, int]] = {}

    def comm_s(self, step: int, k: int) -> float:
        """The exchange after this step."""
        wire_s = OVERHEAD_S + wire_bytes(k, self.hosts) * 8.0 / self.trace.rates[step]
        return float(wire_s * self._wire[step] + self._stall_s[step])

    def computes_s(self, first: int, step: int) -> list[float]:
        """Every host's computation of the steps first .. step."""
        return [float(x) for x in self._sums_s[step + 1] - self._sums_s[first]]

    def step_s(self, first: int, step: int, k: int, hide_steps: int) -> float:
        """What each of the steps first .. step takes with the exchange that they share."""
        interval = step + 1 - first
        latest_s = max(self.computes_s(first, step))
        codec_s = 0.0 if k == CHUNK_NUMEL else CODEC_S
        hidden_s = 0.0 if k == CHUNK_NUMEL else hide_steps * latest_s / interval
        return (latest_s + codec_s + max(0.0, self.comm_s(step, k) - hidden_s)) / interval

    def passed(self, first: int, step: int, k: int) -> Passed:
        """The exchange after the steps first .. step."""
        return Passed(step + 1 - first, k, self.comm_s(step, k), self.computes_s(first, step))

    def oracle(self, step: int, *, hides: bool) -> tuple[int, int]:
        """(interval, k) of one who knows the rate and how unsteady it is, but no step's chance."""
        rate = self.trace.rates[step]
        found = self._oracle.get((rate, hides))
        if found is None:
            found = self._oracle[rate, hides] = best(rate, self.hosts, self.trace.noise, hides)
        return found


def best(rate: float, hosts: int, noise: float, hides: bool) -> tuple[int, int]:
    """The shortest interval, from four steps on, at which 3 % fit; and what fits there."""
    if COMPUTE_S + (OVERHEAD_S + wire_bytes(CHUNK_NUMEL, hosts) * 8.0 / rate) / EASIEST <= BUDGET_S:
        return EASIEST, CHUNK_NUMEL
    k = K_MIN
    for interval in INTERVALS[INTERVALS.index(EASIEST) :]:
        k = affordable(rate, hosts, noise, interval, max(1, interval // 4) if hides else 0)
        if k >= kept_per_chunk(FLOOR):
            return interval, k
    return INTERVALS[-1], k


def affordable(rate: float, hosts: int, noise: float, interval: int, hide_steps: int) -> int:
    """The highest k whose exchange fits at two standard deviations."""
    allowed_s = interval * (BUDGET_S - COMPUTE_S) - CODEC_S + hide_steps * COMPUTE_S
    low, high = K_MIN, K_MAX
    while low < high:
        middle = (low + high + 1) // 2
        comm_s = OVERHEAD_S + wire_bytes(middle, hosts) * 8.0 / rate
        low, high = (
            (middle, high) if comm_s * (1.0 + 2.0 * noise) <= allowed_s else (low, middle - 1)
        )
    return low


def run(name: str, plant: Plant, losses: Sequence[float]) -> tuple[list[Exchange], float]:
    """Let a law steer a run.

    Returns:
        Its exchanges, and processor time of an update, seconds.
    """
    config, trace = config_of(name), plant.trace
    state, decision = control.start(config)
    passed: list[Exchange] = []
    told: list[StepSignals] = []
    last: Passed | None = None
    first = 0
    while True:
        in_warmup = first < config.warmup_steps
        interval = 1 if in_warmup else decision.interval
        step = first + interval - 1
        if step >= len(trace.rates):
            break
        k = round(decision.density * CHUNK_NUMEL)
        hide_steps = 0 if k == CHUNK_NUMEL else config.delay_of(interval)
        told.append(signals_of(plant, losses, first, step, last, config))
        best_interval, best_k = plant.oracle(step, hides=config.overlap == "auto")
        start = max(0, step + 1 - best_interval)
        now = Exchange(
            step=step,
            interval=interval,
            density=decision.density,
            step_s=plant.step_s(first, step, k, hide_steps),
            oracle_s=plant.step_s(start, step, best_k, config.delay_of(best_interval)),
            oracle_share=best_k / CHUNK_NUMEL / best_interval,
            oracle_interval=best_interval,
        )
        passed.append(now)
        last, first = plant.passed(first, step, k), step + 1
        state, decision = control.update(config, state, told[-1])
    began_s = time.thread_time()
    state, _ = control.start(config)
    for signals in told:
        state, _ = control.update(config, state, signals)
    return passed, (time.thread_time() - began_s) / len(told)


def signals_of(
    plant: Plant,
    losses: Sequence[float],
    first: int,
    step: int,
    last: Passed | None,
    config: GradientPruningConfig,
) -> StepSignals:
    """What all hosts know after an exchange: these steps' loss, and the times of the one before.

    Args:
        plant: of the run.
        losses: of every step so far.
        first: the first step since the exchange before, counted from 0.
        step: the last one.
        last: the exchange before; None: there was none.
        config: the law's.
    """
    loss = statistics.fmean(losses[first : step + 1])
    if last is None:
        rank = RankSignals(loss, False, None, 0.0, 0.0, 0, 0)
        return aggregate(step + 1, [rank] * plant.hosts, None, 0)
    latest_s = max(last.computes_s)
    codec_s = 0.0 if last.k == CHUNK_NUMEL else CODEC_S
    ranks = [
        RankSignals(
            loss=loss,
            nonfinite=not math.isfinite(loss),
            compute_time_s=compute_s,
            codec_time_s=codec_s,
            comm_time_s=latest_s - compute_s + last.comm_s,
            wire_bytes=wire_bytes(last.k, plant.hosts),
            agreement=0,
        )
        for compute_s in last.computes_s
    ]
    hide_steps = 0 if last.k == CHUNK_NUMEL else config.delay_of(last.interval)
    return aggregate(
        step + 1,
        ranks,
        last.k / CHUNK_NUMEL,
        wire_bytes(CHUNK_NUMEL, plant.hosts),
        min(1.0, hide_steps / last.interval),
        interval=last.interval,
    )


def stretched(kind: str, seed: int, steps: int) -> Trace:
    """A link of the simulator on which everything takes longer."""
    made = traces.make_trace(kind, seed, steps // STRETCH)
    rates = tuple(RATE_SHARE * rate for rate in made.rates for _ in range(STRETCH))
    stalls = tuple((STRETCH * step, time_s) for step, time_s in made.stalls)
    return Trace(made.name, rates, made.noise, made.outliers, made.outlier_most, made.stragglers,
                 stalls, made.settles)  # fmt: skip
