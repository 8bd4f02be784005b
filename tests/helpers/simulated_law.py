"""A run under a law on a link and losses that a test describes."""

from __future__ import annotations

import math
import random
from typing import Any

from ds_gradprune import law
from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.config import DensityConfig, GradientPruningConfig
from ds_gradprune.law.signals import StepSignals

COMPUTE_S, CODEC_S, OVERHEAD_S, BUDGET_S = 0.2, 0.01, 0.005, 0.3
MBIT = 125_000.0  # bytes per second
DENSE_BYTES = 4_000_000
BYTES_PER_K = 850.0
FIXED_BYTES = 5_000
STALL = 3.0


def make_config(**fields):
    base = {
        "prune": "gradient",
        "warmup_steps": 20,
        "ramp_steps": 20,
        "window_size": 32,
        "step_time_budget_s": BUDGET_S,
        "density": DensityConfig(initial=0.02, min=0.0005, max=0.25),
    }
    return GradientPruningConfig(**(base | fields))


def wire_bytes(k):
    return DENSE_BYTES if k == CHUNK_NUMEL else int(FIXED_BYTES + BYTES_PER_K * k)


def comm_s(k, rate, dense_factor=1.0):
    factor = dense_factor if k == CHUNK_NUMEL else 1.0
    return OVERHEAD_S + factor * wire_bytes(k) / rate


def step_s(k, rate):
    return COMPUTE_S + (0.0 if k == CHUNK_NUMEL else CODEC_S) + comm_s(k, rate)


def falling(step):
    return 5.0 - 0.005 * step


class Run:
    """Steps on, one at a time; times ride one step late, as in a session.

    Attributes:
        decisions: of steps 1 and on.
        state: the law's.
    """

    def __init__(
        self,
        config=None,
        *,
        seed=0,
        noise=0.0,
        dense_factor=1.0,
        codec_s=CODEC_S,
        codec_per_k_s=0.0,
        hides_s=0.0,
    ) -> None:
        self.config = config or make_config()
        self.state, decision = law.start(self.config)
        self.decisions = [decision]
        self.noise, self.dense_factor = noise, dense_factor
        self.codec_s, self.codec_per_k_s = codec_s, codec_per_k_s
        self.hides_s = hides_s
        self.rng = random.Random(seed)
        self.timed: dict[str, Any] | None = None

    def step(self, rate, loss=None, *, stall=1.0, compute=1.0, nonfinite=False, **changed):
        """One step at so many bytes per second; its signals, for a look."""
        number = len(self.decisions)
        used = self.decisions[-1].density
        k = round(used * CHUNK_NUMEL)
        fields = {
            "step": number,
            "loss": falling(number) if loss is None else loss,
            "nonfinite": nonfinite,
            "timed_density": None,
            "compute_time_s": None,
            "codec_time_s": 0.0,
            "comm_time_s": 0.0,
            "step_time_s": None,
            "wire_bytes": 0,
            "dense_bytes": 0,
        }
        if self.timed is not None:
            fields |= self.timed
        signals = StepSignals(**(fields | changed))
        wire_s = comm_s(k, rate, self.dense_factor) * stall
        wire_s *= math.exp(self.noise * self.rng.gauss(0.0, 1.0))
        compute_s = COMPUTE_S * compute * math.exp(0.1 * self.noise * self.rng.gauss(0.0, 1.0))
        codec_s = 0.0 if used == 1.0 else self.codec_s + self.codec_per_k_s * k
        hidden_s = 0.0 if used == 1.0 else min(self.hides_s, wire_s)
        self.timed = {
            "timed_density": used,
            "compute_time_s": compute_s,
            "codec_time_s": codec_s,
            "comm_time_s": wire_s,
            "step_time_s": compute_s + codec_s + wire_s - hidden_s,
            "hidden_time_s": hidden_s,
            "wire_bytes": wire_bytes(k),
            "dense_bytes": DENSE_BYTES,
        }
        self.state, decision = law.update(self.config, self.state, signals)
        self.decisions.append(decision)
        return signals

    def steps(self, count, rate, losses=None, **fields):
        """So many steps alike; `losses`: a function of the step."""
        for _ in range(count):
            number = len(self.decisions)
            self.step(rate, None if losses is None else losses(number), **fields)
        return self

    @property
    def k(self):
        return round(self.decisions[-1].density * CHUNK_NUMEL)

    def causes(self, since):
        return [d.cause for d in self.decisions[since:]]


def best_k(rate, *, budget_s=BUDGET_S):
    """What would fill the budget exactly."""
    return int(((budget_s - COMPUTE_S - CODEC_S - OVERHEAD_S) * rate - FIXED_BYTES) / BYTES_PER_K)
