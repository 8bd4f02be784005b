"""The laws side by side. Each is told the signals of a step, one step late as in a real run."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Protocol

from ds_gradprune import law as control
from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.config import DensityConfig, GradientPruningConfig
from ds_gradprune.law import learning
from ds_gradprune.law.decision import Cause
from ds_gradprune.law.signals import StepSignals
from labs.control.losses import WINDOW
from labs.control.plant import (
    BUDGET_S,
    CODEC_S,
    COMPUTE_S,
    K_MAX,
    K_MIN,
    OVERHEAD_S,
    wire_bytes,
)
from labs.control.traces import Trace

FIRST_DENSITY = 41 / CHUNK_NUMEL


class Law(Protocol):
    """What is compared.

    Attributes:
        density: for the next step.
        missed: the last signals made it call P(t) missed; None: it does not look at the loss.
        evaluated: the last signals made it look at P(t).
    """

    density: float
    missed: bool | None
    evaluated: bool

    def update(self, signals: StepSignals) -> None:
        """Take in one step."""
        ...


class Product:
    """A law of ds_gradprune, as a run would call it.

    Args:
        name: value of `controller` in the configuration.
    """

    def __init__(self, name: str) -> None:
        self.config = GradientPruningConfig(
            controller=name,  # type: ignore[arg-type]  # checked by the model
            prune="gradient",
            warmup_steps=20,
            ramp_steps=20,
            window_size=WINDOW,
            step_time_budget_s=BUDGET_S,
            density=DensityConfig(
                initial=FIRST_DENSITY, min=K_MIN / CHUNK_NUMEL, max=K_MAX / CHUNK_NUMEL
            ),
        )
        self.state, self.decision = control.start(self.config)
        self.density = self.decision.density
        self.missed: bool | None = False
        self.evaluated = False
        self._every = WINDOW // 8 if name == "predictive" else 1
        self._known = 0

    def update(self, signals: StepSignals) -> None:
        """See `Law`."""
        self.state, self.decision = control.update(self.config, self.state, signals)
        self.density = self.decision.density
        self.missed = self.decision.cause is Cause.PERFORMANCE_MISSED
        self._known += self.decision.performance is not None
        self.evaluated = self.decision.performance is not None and not self._known % self._every


class _Simple:
    """What the simple laws share: bounds, and the density as k."""

    missed: bool | None = None
    evaluated = False

    def __init__(self) -> None:
        self.density = FIRST_DENSITY

    def _set(self, density: float) -> None:
        self.density = max(K_MIN / CHUNK_NUMEL, min(K_MAX / CHUNK_NUMEL, density))


class Seed(_Simple):
    """The seed's rule, once a step: P missed, prune less; over budget, prune more; by one factor.

    It says nothing of what happens when both hold and the link is idle; here the density then rises
    by the same factor below 85 % of the budget, as without that it could never recover.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor
        self._window = learning.LossWindow()

    def update(self, signals: StepSignals) -> None:
        """See `Law`."""
        loss = None if signals.nonfinite else signals.loss
        self._window, p = learning.observe(self._window, loss, window_size=WINDOW, form="literal")
        self.evaluated, self.missed = p is not None, p is not None and p < 0.0
        if signals.step_time_s is None:
            return
        if self.missed or signals.step_time_s < 0.85 * BUDGET_S:
            self._set(self.density / self._factor)
        elif signals.step_time_s > BUDGET_S:
            self._set(self.density * self._factor)


class Aimd(_Simple):
    """Additive up, multiplicative down, after a start that doubles: as NetSenseML describes it."""

    def __init__(self) -> None:
        super().__init__()
        self._starting = True

    def update(self, signals: StepSignals) -> None:
        """See `Law`."""
        if signals.step_time_s is None:
            return
        if signals.step_time_s > BUDGET_S:
            self._starting = False
            self._set(self.density * 0.5)
        else:
            self._set(self.density * 2.0 if self._starting else self.density + 0.0003)


class Kimad(_Simple):
    """Kimad's budget: bytes = measured bandwidth * (time allowed - computation)."""

    def __init__(self, hosts: int) -> None:
        super().__init__()
        self._per_density = wire_bytes(1000, hosts) / (1000 / CHUNK_NUMEL)

    def update(self, signals: StepSignals) -> None:
        """See `Law`."""
        if signals.compute_time_s is None or signals.comm_time_s <= 0.0:
            return
        bandwidth = signals.wire_bytes / signals.comm_time_s
        allowed_s = BUDGET_S - signals.compute_time_s - signals.codec_time_s
        self._set(bandwidth * max(0.0, allowed_s) / self._per_density)


class Model(_Simple):
    """Median cost of the last 12 exchanges and feed-forward, with or without change detection."""

    def __init__(self, hosts: int, *, detects: bool) -> None:
        super().__init__()
        self._per_density = wire_bytes(1000, hosts) / (1000 / CHUNK_NUMEL)
        self._detects = detects
        self._costs: deque[float] = deque(maxlen=12)
        self._computes_s: deque[float] = deque(maxlen=16)
        self._slower = self._faster = 0.0

    def update(self, signals: StepSignals) -> None:
        """See `Law`."""
        if signals.compute_time_s is None or signals.comm_time_s <= 0.0:
            return
        self._computes_s.append(signals.compute_time_s)
        cost = max(signals.comm_time_s - OVERHEAD_S, 1e-4) / signals.wire_bytes
        if self._detects and self._costs:
            move = max(-1.0, min(1.0, math.log(cost / median(self._costs))))
            self._slower = max(0.0, self._slower + move - 0.15)
            self._faster = max(0.0, self._faster - move - 0.15)
            if max(self._slower, self._faster) > 1.2:
                self._costs.clear()
                self._slower = self._faster = 0.0
        self._costs.append(cost)
        allowed_s = 0.93 * BUDGET_S - median(self._computes_s) - signals.codec_time_s - OVERHEAD_S
        target = allowed_s / median(self._costs) / self._per_density
        if not 0.925 * self.density <= target <= 1.15 * self.density:
            self._set(target)


class Oracle(_Simple):
    """Knows the rate of every step and how unsteady the link is, but no step's chance.

    It takes the highest density that the budget affords at two standard deviations. A law that
    cannot know the rate beforehand is measured against it.
    """

    def __init__(self, trace: Trace, hosts: int) -> None:
        super().__init__()
        self._trace, self._hosts = trace, hosts
        self._step = 0
        self._known: dict[float, float] = {}
        self._look()

    def update(self, signals: StepSignals) -> None:
        """See `Law`."""
        self._step += 1
        self._look()

    def _look(self) -> None:
        if self._step < len(self._trace.rates):
            rate = self._trace.rates[self._step]
            if rate not in self._known:
                self._known[rate] = best_density(rate, self._hosts, 2.0 * self._trace.noise)
            self.density = self._known[rate]


def best_density(rate: float, hosts: int, reserve: float) -> float:
    """The highest density whose exchange, longer by `reserve`, is in budget; dense if that is."""
    dense_s = OVERHEAD_S + wire_bytes(CHUNK_NUMEL, hosts) * 8.0 / rate
    if COMPUTE_S + dense_s * (1.0 + reserve) <= BUDGET_S:
        return 1.0
    allowed_s = (BUDGET_S - COMPUTE_S - CODEC_S) / (1.0 + reserve) - OVERHEAD_S
    fixed = wire_bytes(0, hosts)
    per_k = wire_bytes(1, hosts) - fixed
    k = int((allowed_s * rate / 8.0 - fixed) / per_k)
    return max(K_MIN, min(K_MAX, k)) / CHUNK_NUMEL


def make_law(name: str, trace: Trace, hosts: int) -> Law:
    """A law at its start."""
    if name in ("predictive", "stepwise"):
        return Product(name)
    if name.startswith("seed_"):
        return Seed(float(name.removeprefix("seed_")))
    if name == "aimd":
        return Aimd()
    if name == "kimad":
        return Kimad(hosts)
    if name in ("model", "model_cusum"):
        return Model(hosts, detects=name == "model_cusum")
    assert name == "oracle"
    return Oracle(trace, hosts)


NAMES = (
    "predictive",
    "stepwise",
    "seed_0.9",
    "seed_0.7",
    "seed_0.5",
    "aimd",
    "kimad",
    "model",
    "model_cusum",
    "oracle",
)
