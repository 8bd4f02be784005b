"""Expected losses: only from what was measured, and the pages say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_gradprune.commands import loss_gap
from ds_gradprune.commands.forecast import Setting


@pytest.mark.parametrize("row", loss_gap.TABLE, ids=lambda row: f"{row.page}-{row.density}")
def test_every_row_is_on_its_page(row: loss_gap.Measured, repo_root: Path) -> None:
    text = (repo_root / "results" / row.page).read_text(encoding="utf-8")
    assert f"| {row.gap:+.2f} |" in text
    assert f"{row.numel:,} parameters" in text
    assert f"{row.islands} simulated workers, {row.steps} steps" in text
    assert row.spread is None or f"| {row.gap:+.2f} | {row.spread:.2f} |" in text


def test_measured_settings_are_quoted() -> None:
    gap = loss_gap.expected(Setting(0.01), 4, 1_071_872)
    assert gap is not None
    assert gap.percent == 1.74
    # Three seeds: at least the spread that chance alone would leave.
    assert gap.sigma == pytest.approx(0.22)
    assert gap.text == "+1.74 ± 0.22 %"


def test_one_seed_is_as_uncertain_as_chance() -> None:
    gap = loss_gap.expected(Setting(0.01), 4, 10_000_000)
    assert gap is not None
    assert gap.sigma == loss_gap.CHANCE


def test_between_two_densities_it_lies_between() -> None:
    gap = loss_gap.expected(Setting(0.05), 4, 200_000)
    assert gap is not None
    assert 0.74 < gap.percent < 0.88
    assert len(gap.sources) == 2


@pytest.mark.parametrize(
    ("setting", "islands", "numel"),
    [
        (Setting(0.01), 4, 124_000_000),
        (Setting(0.01), 2, 1_000_000),
        (Setting(0.01), 3, 156_160),
        (Setting(0.01, 5), 4, 1_000_000),
        (Setting(0.05), 4, 1_000_000),
    ],
)
def test_elsewhere_it_is_unknown(setting: Setting, islands: int, numel: int) -> None:
    assert loss_gap.expected(setting, islands, numel) is None


def test_the_nearest_is_of_the_nearest_size() -> None:
    row = loss_gap.nearest_measured(Setting(0.01, 5), 124_000_000)
    assert row.numel == 10_671_360
    assert "+1.85 % with 1 % every step, 4 islands, 11M parameters" in loss_gap.source_text(row)
