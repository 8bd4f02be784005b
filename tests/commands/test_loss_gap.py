"""Expected losses: a law through what was measured, less certain away from it."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

from ds_gradprune.commands import loss_gap
from ds_gradprune.commands.forecast import Setting
from ds_gradprune.commands.loss_gap import expected

ROUNDS = Setting(1 / 32, 5)


@pytest.mark.parametrize(
    "row", loss_gap.TABLE, ids=lambda row: f"{row.page}-{row.interval}-{row.density}"
)
def test_every_row_is_on_its_page(row: loss_gap.Measured, repo_root: Path) -> None:
    text = (repo_root / "results" / row.page).read_text(encoding="utf-8")
    if row.page.startswith("finetune"):
        assert f"| {row.seeds} | 3.2086 | {row.gap:+.2f} (0.02) |" in text
        assert f"{row.numel / 1e6:.1f}M parameters" in text
        assert f"{row.tokens:,} tokens each per step" in text
        assert f"{row.steps} steps" in text
        return
    assert f"| {row.gap:+.2f} |" in text
    assert f"{row.numel:,} parameters" in text
    assert f"{row.islands} simulated workers, {row.steps} steps" in text
    assert f"context {row.tokens // _batch(text)}," in text
    assert row.spread is None or f"| {row.gap:+.2f} | {row.spread:.2f} |" in text


def _batch(text: str) -> int:
    before, _, _ = text.partition(" sequences per worker")
    return int(before.rpartition(" ")[2])


def test_the_law_goes_through_what_was_measured() -> None:
    """Residuals in their own standard deviations are about one in the mean."""
    squares = []
    for row in loss_gap.TABLE:
        law = expected(row.setting, row.islands, row.numel, row.tokens).percent
        sigma = math.hypot(row.error, loss_gap.SCATTER * law)
        squares.append(((row.gap - law) / sigma) ** 2)
    assert sum(squares) / len(squares) < 2
    assert max(squares) < 3**2


def test_more_islands_lose_more() -> None:
    gaps = [expected(ROUNDS, islands, 1_000_000, 256).percent for islands in (2, 4, 8)]
    assert all(fewer < more for fewer, more in pairwise(gaps))


def test_it_is_less_certain_away_from_measurements() -> None:
    widths = []
    for numel, tokens in ((1_000_000, 256), (124_000_000, 256), (124_000_000, 65_536)):
        gap = expected(ROUNDS, 2, numel, tokens)
        assert gap.low < gap.percent < gap.high
        widths.append(gap.high / gap.low)
    assert all(near < far for near, far in pairwise(widths))


def test_measurements_narrow_what_was_known_before() -> None:
    _, covariance = loss_gap._law()
    for i, row in enumerate(covariance):
        assert 0 < row[i] <= loss_gap.PRIOR[i][1] ** 2 * (1 + 1e-9)
        assert row == pytest.approx([other[i] for other in covariance], rel=1e-6, abs=1e-12)


def test_the_fit_has_come_to_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, _ = loss_gap._law()
    monkeypatch.setattr(loss_gap, "_ROUNDS", 2 * loss_gap._ROUNDS)
    longer, _ = loss_gap._law.__wrapped__()
    assert longer == pytest.approx(mean, abs=1e-9)


def test_the_inverse() -> None:
    assert loss_gap._inverse([[4.0, 1.0], [1.0, 3.0]]) == [
        pytest.approx([3 / 11, -1 / 11]),
        pytest.approx([-1 / 11, 4 / 11]),
    ]


def test_the_nearest_is_of_the_nearest_size() -> None:
    row = loss_gap.nearest_measured(Setting(0.01, 5), 2, 124_000_000)
    assert row.numel == max(row.numel for row in loss_gap.TABLE)
    assert f"{row.gap:+.2f} % with {row.setting.name}" in loss_gap.source_text(row)


def test_fine_tuning_lies_within_what_is_foretold_by_a_little_more_than_a_deviation() -> None:
    row = next(row for row in loss_gap.TABLE if row.page.startswith("finetune"))
    gap = expected(row.setting, row.islands, row.numel, row.tokens)
    assert gap.text == "+0.35 (0.23 to 0.52)"  # docs/modes.md says it beside the measured gap
    sigmas = math.log(row.gap / gap.percent) / math.log(gap.high / gap.percent)
    assert 1.0 < sigmas < 1.3


def test_text() -> None:
    assert loss_gap.Gap(0.7, 0.5, 1.04).text == "+0.7 (0.5 to 1)"
