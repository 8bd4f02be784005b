"""The training run that a law steers: hosts that compute, and exchanges that take time.

A model of 124M parameters on N hosts, 0.6 s of computation a step, a budget of 0.9 s, an overhead
of 10 ms per exchange; payloads of 14 bits per kept element to N - 1 peers. What one step's chance
brings (noise, outliers, stragglers) is the same for every law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.law.consensus import aggregate
from ds_gradprune.law.signals import RankSignals, StepSignals
from ds_gradprune.wire.traffic import all_gather_bytes, ring_all_reduce_bytes
from labs.control.traces import Trace

NUMEL = 124_000_000
COMPUTE_S, CODEC_S, OVERHEAD_S, BUDGET_S = 0.6, 0.02, 0.010, 0.9
BITS_PER_KEPT = 14.0
DENSE_SEGMENT_BYTES = 100_000
K_MIN, K_MAX = 1, CHUNK_NUMEL // 4
COMPUTE_NOISE = 0.01


def wire_bytes(k: int, hosts: int) -> int:
    """What one host sends with k kept elements per chunk; CHUNK_NUMEL: dense."""
    if k == CHUNK_NUMEL:
        return 64 * (hosts - 1) + ring_all_reduce_bytes(4 * NUMEL, hosts)
    kept = NUMEL // CHUNK_NUMEL * k
    return all_gather_bytes(64 + DENSE_SEGMENT_BYTES + int(kept * BITS_PER_KEPT / 8), hosts)


@dataclass(frozen=True, slots=True)
class Chance:
    """What happens whoever steers.

    Attributes:
        wire: (steps,) factor on the wire time.
        stall_s: (steps,) seconds on top.
        compute_s: (steps, hosts).
    """

    wire: np.ndarray
    stall_s: np.ndarray
    compute_s: np.ndarray


def draw(trace: Trace, hosts: int, seed: int) -> Chance:
    """The chance of one run."""
    rng = np.random.default_rng([seed, hosts, *trace.name.encode()])
    steps = len(trace.rates)
    wire = np.exp(trace.noise * rng.standard_normal(steps))
    least = min(2.0, trace.outlier_most / 2.0)
    times = rng.uniform(least, trace.outlier_most, steps)
    wire = np.where(rng.random(steps) < trace.outliers, wire * times, wire)
    compute_s = COMPUTE_S * np.exp(COMPUTE_NOISE * rng.standard_normal((steps, hosts)))
    late = rng.random(steps) < trace.stragglers
    who, by = rng.integers(0, hosts, steps), rng.uniform(1.3, 2.5, steps)
    compute_s[np.arange(steps), who] *= np.where(late, by, 1.0)
    stall_s = np.zeros(steps)
    for step, time_s in trace.stalls:
        stall_s[step] += time_s
    return Chance(wire, stall_s, compute_s)


class Plant:
    """One run, step by step.

    Args:
        trace: the link.
        losses: one per step.
        hosts: N.
        chance: what happens whoever steers.
    """

    def __init__(self, trace: Trace, losses: list[float], hosts: int, chance: Chance) -> None:
        self._trace, self._losses, self._hosts = trace, losses, hosts
        self._wire = chance.wire.tolist()
        self._stall_s = chance.stall_s.tolist()
        self._compute_s = chance.compute_s.tolist()
        self._last: list[tuple[float, float, float, int]] | None = None
        self._last_density: float | None = None

    def step_s(self, step: int, k: int) -> float:
        """What step `step` (from 0) takes with k, chance included."""
        ready_s = max(self._compute_s[step]) + (0.0 if k == CHUNK_NUMEL else CODEC_S)
        return ready_s + self._comm_s(step, k)

    def _comm_s(self, step: int, k: int) -> float:
        wire_s = OVERHEAD_S + wire_bytes(k, self._hosts) * 8.0 / self._trace.rates[step]
        return wire_s * self._wire[step] + self._stall_s[step]

    def run_step(self, step: int, density: float) -> tuple[StepSignals, float]:
        """Make one step.

        Args:
            step: counted from 0.
            density: what the law chose.

        Returns:
            What all hosts then know: this step's loss, and the times of the step before; and how
            long the step took.
        """
        k = round(density * CHUNK_NUMEL)
        codec_s = 0.0 if k == CHUNK_NUMEL else CODEC_S
        loss = self._losses[step]
        last = self._last or [(0.0, 0.0, 0.0, 0)] * self._hosts
        ranks = [
            RankSignals(
                loss=loss,
                nonfinite=not math.isfinite(loss),
                compute_time_s=compute_s if self._last else None,
                codec_time_s=codec_time_s,
                comm_time_s=comm_s,
                wire_bytes=sent,
                agreement=0,
            )
            for compute_s, codec_time_s, comm_s, sent in last
        ]
        dense_bytes = wire_bytes(CHUNK_NUMEL, self._hosts)
        signals = aggregate(step + 1, ranks, self._last_density, dense_bytes)
        computes_s = self._compute_s[step]
        comm_s, sent, latest_s = self._comm_s(step, k), wire_bytes(k, self._hosts), max(computes_s)
        # Who is ready early waits for the last one; the wait is in its exchange.
        self._last = [(c, codec_s, latest_s - c + comm_s, sent) for c in computes_s]
        self._last_density = density
        return signals, latest_s + codec_s + comm_s
