"""Islands under a law: an exchange every few steps, behind the computation or not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from ds_gradprune import law
from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.config import DensityConfig, GradientPruningConfig
from ds_gradprune.law.decision import Cause, Decision
from ds_gradprune.law.signals import StepSignals
from tests.helpers.simulated_law import (
    CODEC_S,
    COMPUTE_S,
    DENSE_BYTES,
    OVERHEAD_S,
    comm_s,
    falling,
    wire_bytes,
)

UNPRUNED_BYTES = DENSE_BYTES // 16
"""Values of 2 bits."""


def make_config(**fields: Any) -> GradientPruningConfig:
    base: dict[str, Any] = {
        "prune": "update",
        "warmup": "dense",
        "warmup_steps": 20,
        "ramp_steps": 20,
        "window_size": 128,
        "step_time_budget_s": 0.3,
        "density": DensityConfig(initial=0.05, min=0.0005, max=0.25),
    }
    return GradientPruningConfig(**(base | fields))


class IslandRun:
    """Exchanges on, one at a time; times ride one exchange late.

    Attributes:
        decisions: of the first exchange and on.
        step: finished optimizer steps.
        state: the law's.
        steps_s: of every exchange (steps, seconds of each of them).
    """

    def __init__(
        self, config: GradientPruningConfig | None = None, *, seed: int = 0, noise: float = 0.0
    ) -> None:
        self.config = config or make_config()
        self.state, decision = law.start(self.config)
        self.decisions = [decision]
        self.noise = noise
        self.rng = random.Random(seed)
        self.step = 0
        self.steps_s: list[tuple[int, float]] = []
        self._timed: dict[str, Any] = {}

    @property
    def k(self) -> int:
        return round(self.decisions[-1].density * CHUNK_NUMEL)

    @property
    def interval(self) -> int:
        """Of the exchange that is next."""
        return self.decisions[-1].interval

    def plateau(self, _: int) -> float:
        return 2.0 + 0.05 * self.rng.gauss(0.0, 1.0)

    def exchange(
        self,
        rate: float,
        loss_of: Callable[[int], float] = falling,
        *,
        stall: float = 1.0,
        nonfinite: bool = False,
    ) -> Decision:
        """The steps up to an exchange and the exchange, at so many bytes per second."""
        in_rounds = self.step >= self.config.warmup_steps or self.decisions[-1].unpruned
        interval = self.interval if in_rounds else 1
        steps = range(self.step + 1, self.step + interval + 1)
        self.step += interval
        base: dict[str, Any] = {
            "timed_density": None,
            "compute_time_s": None,
            "codec_time_s": 0.0,
            "comm_time_s": 0.0,
            "step_time_s": None,
            "wire_bytes": 0,
            "dense_bytes": 0,
        }
        loss = math.fsum(loss_of(step) for step in steps) / interval
        signals = StepSignals(
            step=self.step, loss=loss, nonfinite=nonfinite, **(base | self._timed)
        )
        self._time(interval, self._wire_s(rate) * stall)
        self.state, decision = law.update(self.config, self.state, signals)
        self.decisions.append(decision)
        return decision

    def exchanges(
        self, count: int, rate: float, loss_of: Callable[[int], float] = falling
    ) -> IslandRun:
        for _ in range(count):
            self.exchange(rate, loss_of)
        return self

    def raises(self, since: int) -> list[Decision]:
        return [d for d in self.decisions[since:] if d.cause is Cause.PERFORMANCE_MISSED]

    def _wire_s(self, rate: float) -> float:
        if self.decisions[-1].unpruned:
            return OVERHEAD_S + UNPRUNED_BYTES / rate
        return comm_s(self.k, rate)

    def _time(self, interval: int, wire_s: float) -> None:
        used, k, unpruned = self.decisions[-1].density, self.k, self.decisions[-1].unpruned
        is_dense = used == 1.0 and not unpruned
        wire_s *= math.exp(self.noise * self.rng.gauss(0.0, 1.0))
        computes = [math.exp(0.1 * self.noise * self.rng.gauss(0.0, 1.0)) for _ in range(interval)]
        compute_s = COMPUTE_S * math.fsum(computes)
        codec_s = 0.0 if is_dense else CODEC_S
        delay_steps = self.config.delay_of(interval, unpruned=unpruned)
        hidden_s = 0.0 if is_dense else delay_steps * COMPUTE_S
        step_s = compute_s + codec_s + max(0.0, wire_s - hidden_s)
        self.steps_s.append((interval, step_s / interval))
        self._timed = {
            "timed_density": used,
            "compute_time_s": compute_s,
            "codec_time_s": codec_s,
            "comm_time_s": wire_s,
            "step_time_s": step_s,
            "wire_bytes": UNPRUNED_BYTES if unpruned else wire_bytes(k),
            "dense_bytes": DENSE_BYTES,
            "interval": interval,
            "timed_unpruned": unpruned,
        }
