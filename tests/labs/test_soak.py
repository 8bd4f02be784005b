"""A short run of the soak: the same figures that the long one is judged by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labs import soak

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mode", [[], ["--sync-every", "4"], ["--prune", "gradient"]], ids=str)
def test_a_short_soak_holds_its_bounds(
    mode: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A log grew by 0.95 kB a step without limit."""
    monkeypatch.setattr(soak, "MAX_BYTES", 100_000)
    monkeypatch.setattr(soak, "STEPS_PER_RATE", 100)
    monkeypatch.setattr(soak, "MAX_GROWTH", 0.2)  # so few steps that caches still fill
    page = tmp_path / "soak.md"
    flags = ["--steps", "600", "--numel", "5000", "--out", str(page), *mode]
    assert soak.main(flags) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["looks_that_differed"] == 0
    assert document["densities"] > 3
    assert 50_000 < document["log_bytes"] <= document["log_bound_bytes"] == 300_000
    assert document["log_files"] == (2 if "4" in mode else 3)
    assert f"| `memory_growth` | {document['memory_growth']} |" in page.read_text()
