"""How much loss a setting is expected to cost, from what was measured; and where nothing was. Pure.

Gaps are of the final validation loss to dense training with the same hyper-parameters, in percent.
They were simulated through the product's own selection and codec. A gap is named only where number
of islands, interval and size lie close to a measured one; everywhere else it is unknown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ds_gradprune.commands.forecast import Setting

CHANCE = 0.35
"""Standard deviation of a paired gap of one seed by chance alone, in percent (docs/modes.md)."""

SIZE_FACTOR = 4.0
"""A size within this factor of a measured one is close to it."""

DENSITY_FACTOR = 1.5
"""The same for a density outside of those measured."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of a page of results/.

    Attributes:
        islands: number of them.
        numel: parameters.
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
    density: float
    interval: int
    gap: float
    spread: float | None
    seeds: int
    steps: int
    page: str

    @property
    def sigma(self) -> float:
        """What the gap may be off by, percent."""
        return CHANCE if self.spread is None else max(self.spread, CHANCE / math.sqrt(self.seeds))


_FRONTIER = "convergence_cpu_202611_frontier.md"

TABLE = (
    Measured(4, 156_160, 0.10, 1, 0.74, 0.47, 3, 3000, _FRONTIER),
    Measured(4, 156_160, 0.03, 1, 0.88, 0.59, 3, 3000, _FRONTIER),
    Measured(4, 156_160, 0.01, 1, 1.25, 0.24, 3, 3000, _FRONTIER),
    Measured(4, 156_160, 0.001, 1, 4.42, 0.51, 3, 3000, _FRONTIER),
    Measured(
        4, 1_000_960, 0.01, 1, 1.74, 0.22, 3, 3000, "convergence_cpu_202611_frontier_million.md"
    ),
    Measured(4, 10_671_360, 0.01, 1, 1.85, None, 1, 3000, "convergence_cpu_202611_ten_million.md"),
    Measured(2, 156_160, 0.01, 1, 1.58, None, 1, 800, "convergence_cpu_202611_2islands.md"),
    Measured(8, 156_160, 0.01, 1, 1.63, None, 1, 800, "convergence_cpu_202611_8islands.md"),
    Measured(16, 156_160, 0.01, 1, 3.95, None, 1, 800, "convergence_cpu_202611_16islands.md"),
)
"""Islands with the default scale and 4-bit values, without slow momentum. Longer intervals were run
with another residual than today's default, so nothing is known of them."""


@dataclass(frozen=True, slots=True)
class Gap:
    """An expected gap.

    Attributes:
        percent: of the final validation loss.
        sigma: standard deviation of it, percent.
        sources: the rows it comes from, one or two.
    """

    percent: float
    sigma: float
    sources: tuple[Measured, ...]

    @property
    def text(self) -> str:
        """For a table: "+1.74 ± 0.35 %"."""
        return f"{self.percent:+.2f} ± {self.sigma:.2f} %"


def expected(setting: Setting, islands: int, numel: int) -> Gap | None:
    """What a setting is expected to cost.

    Between two measured densities of one size the gap is read off a line over log(density).

    Returns:
        None: nothing was measured close to it.
    """
    rows = _of_nearest_size(setting, islands, numel)
    if not rows:
        return None
    below = max((r for r in rows if r.density <= setting.density), key=_density, default=None)
    above = min((r for r in rows if r.density >= setting.density), key=_density, default=None)
    if below is None or above is None:
        row = below or above
        assert row is not None
        if _apart(row.density, setting.density) > DENSITY_FACTOR:
            return None
        return Gap(row.gap, row.sigma, (row,))
    if below.density == above.density:
        return Gap(below.gap, below.sigma, (below,))
    share = math.log(setting.density / below.density) / math.log(above.density / below.density)
    gap = below.gap + share * (above.gap - below.gap)
    return Gap(gap, max(below.sigma, above.sigma), (below, above))


def _of_nearest_size(setting: Setting, islands: int, numel: int) -> list[Measured]:
    """Rows of the measured size that is closest; none where that is too far."""
    rows = [r for r in TABLE if r.islands == islands and r.interval == setting.interval]
    rows = [r for r in rows if _apart(r.numel, numel) <= SIZE_FACTOR]
    nearest = min((_apart(r.numel, numel) for r in rows), default=1.0)
    return [r for r in rows if _apart(r.numel, numel) == nearest]


def nearest_measured(setting: Setting, numel: int) -> Measured:
    """For a user with an unknown gap: the measured row with the nearest size, then the density."""
    return min(
        TABLE,
        key=lambda r: (
            _apart(r.numel, numel),
            abs(math.log(r.interval / setting.interval)),
            _apart(r.density, setting.density),
        ),
    )


def source_text(row: Measured) -> str:
    """Where a number comes from."""
    seeds = "one seed" if row.seeds == 1 else f"{row.seeds} seeds"
    return (
        f"{row.gap:+.2f} % with {Setting(row.density, row.interval).name}, {row.islands} islands, "
        f"{row.numel / 1e6:.2g}M parameters, {row.steps} steps, {seeds} (results/{row.page})"
    )


def _apart(one: float, other: float) -> float:
    return max(one / other, other / one)


def _density(row: Measured) -> float:
    return row.density
