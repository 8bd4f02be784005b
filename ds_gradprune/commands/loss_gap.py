"""How much loss a setting is expected to cost: a power law through what was measured. Pure.

Gaps are of the final validation loss to dense training with the same hyper-parameters, in percent.
They were simulated through the product's own selection and codec, with its default settings.

    gap = a * (islands - 1)^b * sync_every^c * density^d * parameters^e * tokens^f

with another `a` for an exchange in every step, where the residual is used. The exponents start from
what others have published (`PRIOR`) and follow the measurements in `TABLE`. Around every gap the
law leaves a scatter of `SCATTER` of it. What it foretells far from any measurement is therefore
less certain, and `Gap` says how much. All cases but one were trained from nothing. The one of
fine-tuning lost twice what the others had foretold, 1.5 of their standard deviations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ds_gradprune.commands.forecast import Setting

CHANCE = 0.35
"""Standard deviation of a paired gap of one seed by chance alone, in percent (docs/modes.md)."""

SCATTER = 0.25
"""Standard deviation of a true gap about the law, as part of it."""

PRIOR = (
    (math.log(0.7), 1.0),  # two islands, 1M, every 5 steps, 3.1 %, 256 tokens
    (0.0, 0.7),  # an exchange in every step
    (0.9, 0.3),  # islands - 1: DiLoCo's scaling laws (arXiv 2503.09799), 2 to 8 at 35M to 1.3B
    (0.4, 0.3),  # sync_every
    (-0.2, 0.2),  # density
    (-0.2, 0.15),  # parameters: the same source
    (-0.3, 0.3),  # tokens per island and step
)
"""Mean and standard deviation of the law's logarithmic coefficients before any measurement."""

_NUMEL, _TOKENS, _DENSITY, _INTERVAL = 1e6, 256, 1 / 32, 5
_ROUNDS = 50


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of a page of results/.

    Attributes:
        islands: number of them.
        numel: parameters.
        tokens: per island and optimizer step.
        density: kept / all.
        interval: steps per exchange.
        gap: percent.
        spread: standard deviation over seeds, percent; None: one seed.
        seeds: behind the mean.
        steps: optimizer steps of a run.
        page: in results/.
    """

    islands: int
    numel: int
    tokens: int
    density: float
    interval: int
    gap: float
    spread: float | None
    seeds: int
    steps: int
    page: str

    @property
    def error(self) -> float:
        """Standard error of the gap, percent; not below what chance leaves."""
        return max(self.spread or 0.0, CHANCE) / math.sqrt(self.seeds)

    @property
    def setting(self) -> Setting:
        """What a user would choose."""
        return Setting(self.density, self.interval)


_CPU, _GPU = "convergence_cpu_202611_", "convergence_gpu_202611_"
_S, _M, _L = 156_160, 1_000_960, 10_671_360
_ROW = 1 / 32
_SMOLLM2, _TUNED = 134_515_008, "finetune_gpu_202611.md"

TABLE = (
    Measured(2, _S, 256, 0.01, 1, 0.51, 0.30, 4, 3000, f"{_CPU}rounds.md"),
    Measured(2, _S, 256, _ROW, 5, 1.07, 0.40, 4, 3000, f"{_CPU}rounds.md"),
    Measured(2, _S, 256, _ROW, 10, 1.05, 0.25, 4, 3000, f"{_CPU}rounds.md"),
    Measured(2, _S, 256, 2 * _ROW, 10, 1.08, 0.42, 4, 3000, f"{_CPU}rounds.md"),
    Measured(2, _M, 256, 0.01, 1, 0.75, 0.26, 6, 3000, f"{_GPU}million_256_2.md"),
    Measured(2, _M, 256, _ROW, 5, 0.72, 0.24, 6, 3000, f"{_GPU}million_256_2.md"),
    Measured(2, _M, 256, _ROW, 10, 0.35, 0.39, 6, 3000, f"{_GPU}million_256_2.md"),
    Measured(2, _M, 1024, _ROW, 10, 0.38, 0.41, 6, 2000, f"{_GPU}million_1k_2.md"),
    Measured(2, _L, 256, 0.01, 1, 0.65, 0.38, 4, 1500, f"{_GPU}ten_million_256_2.md"),
    Measured(2, _L, 256, _ROW, 5, 0.43, 0.18, 4, 1500, f"{_GPU}ten_million_256_2.md"),
    Measured(2, _L, 256, _ROW, 10, 0.52, 0.17, 4, 1500, f"{_GPU}ten_million_256_2.md"),
    Measured(4, _S, 256, 0.10, 1, 0.74, 0.47, 3, 3000, f"{_CPU}frontier.md"),
    Measured(4, _S, 256, 0.03, 1, 0.88, 0.59, 3, 3000, f"{_CPU}frontier.md"),
    Measured(4, _S, 256, 0.01, 1, 1.25, 0.24, 3, 3000, f"{_CPU}frontier.md"),
    Measured(4, _S, 256, 0.001, 1, 4.42, 0.51, 3, 3000, f"{_CPU}frontier.md"),
    Measured(4, _S, 256, _ROW, 5, 1.15, 0.73, 2, 3000, f"{_CPU}rounds_four.md"),
    Measured(4, _S, 256, _ROW, 10, 1.77, 0.84, 2, 3000, f"{_CPU}rounds_four.md"),
    Measured(4, _M, 256, 0.01, 1, 1.74, 0.22, 3, 3000, f"{_CPU}frontier_million.md"),
    Measured(4, _M, 256, 0.01, 1, 1.60, 0.23, 3, 3000, f"{_GPU}million_256_4.md"),
    Measured(4, _M, 256, _ROW, 5, 1.27, 0.21, 6, 3000, f"{_GPU}million_256_4.md"),
    Measured(4, _M, 256, _ROW, 10, 1.65, 0.20, 6, 3000, f"{_GPU}million_256_4.md"),
    Measured(4, _L, 128, 0.01, 1, 1.85, None, 1, 3000, f"{_CPU}ten_million.md"),
    Measured(2, _SMOLLM2, 1024, _ROW, 10, 0.54, 0.04, 4, 300, _TUNED),
)
"""Islands with the default scale and residual, without slow momentum, at the best learning rate of
dense training. The last is fine-tuning: what a trained model loses."""


@dataclass(frozen=True, slots=True)
class Gap:
    """An expected gap.

    Attributes:
        percent: of the final validation loss; as likely above as below.
        low: one standard deviation below, percent.
        high: one above.
    """

    percent: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """For a table: "+0.7 (0.5 to 1.0)"."""
        return f"+{self.percent:.2g} ({self.low:.2g} to {self.high:.2g})"


def expected(setting: Setting, islands: int, numel: int, tokens: int) -> Gap:
    """What a setting is expected to cost.

    Args:
        setting: density and interval.
        islands: at least 2.
        numel: parameters that are trained.
        tokens: per island and optimizer step.
    """
    mean, covariance = _law()
    place = _features(setting, islands, numel, tokens)
    log_gap = _dot(place, mean)
    sigma = math.sqrt(_dot(place, [_dot(row, place) for row in covariance]) + SCATTER**2)
    return Gap(math.exp(log_gap), math.exp(log_gap - sigma), math.exp(log_gap + sigma))


def nearest_measured(setting: Setting, islands: int, numel: int) -> Measured:
    """The measured row with the nearest size, then number of islands, interval and density."""
    return min(
        TABLE,
        key=lambda row: (
            _apart(row.numel, numel),
            _apart(row.islands, islands),
            _apart(row.interval, setting.interval),
            _apart(row.density, setting.density),
        ),
    )


def source_text(row: Measured) -> str:
    """Where a number comes from."""
    seeds = "one seed" if row.seeds == 1 else f"{row.seeds} seeds"
    return (
        f"{row.gap:+.2f} % with {row.setting.name}, {row.islands} islands, "
        f"{row.numel / 1e6:.2g}M parameters, {row.tokens:,} tokens a step and island, "
        f"{row.steps} steps, {seeds} (results/{row.page})"
    )


def _features(setting: Setting, islands: int, numel: int, tokens: int) -> list[float]:
    """What the coefficients of `PRIOR` are multiplied by."""
    is_every_step = setting.interval == 1
    return [
        1.0,
        float(is_every_step),
        math.log(max(1, islands - 1)),
        0.0 if is_every_step else math.log(setting.interval / _INTERVAL),
        math.log(setting.density / _DENSITY),
        math.log(numel / _NUMEL),
        math.log(tokens / _TOKENS),
    ]


@functools.cache
def _law() -> tuple[list[float], list[list[float]]]:
    """Coefficients and their covariance: Laplace's approximation.

    A gap is Gaussian about the law, with its standard error and the scatter, and so are the
    coefficients before it. Gauss and Newton find the most likely ones, by half steps.
    """
    size = range(len(PRIOR))
    mean = [centre for centre, _ in PRIOR]
    places = [_features(row.setting, row.islands, row.numel, row.tokens) for row in TABLE]
    covariance: list[list[float]] = []
    for _ in range(_ROUNDS):
        precision = [[PRIOR[i][1] ** -2 * (i == j) for j in size] for i in size]
        pull = [(centre - now) / width**2 for (centre, width), now in zip(PRIOR, mean, strict=True)]
        for row, place in zip(TABLE, places, strict=True):
            law = math.exp(_dot(place, mean))
            weight = law / (row.error**2 + (SCATTER * law) ** 2)
            for i in size:
                pull[i] += weight * (row.gap - law) * place[i]
                for j in size:
                    precision[i][j] += weight * law * place[i] * place[j]
        covariance = _inverse(precision)
        mean = [now + 0.5 * _dot(row, pull) for now, row in zip(mean, covariance, strict=True)]
    return mean, covariance


def _inverse(matrix: list[list[float]]) -> list[list[float]]:
    """Of a positive definite matrix, by Gauss and Jordan."""
    size = len(matrix)
    both = [[*row, *(float(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for i in range(size):
        both[i] = [value / both[i][i] for value in both[i]]
        for j in range(size):
            if j != i:
                both[j] = [a - both[j][i] * b for a, b in zip(both[j], both[i], strict=True)]
    return [row[size:] for row in both]


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _apart(one: float, other: float) -> float:
    return max(one / other, other / one)
