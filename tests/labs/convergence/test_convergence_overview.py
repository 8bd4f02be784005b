"""The picture of several grids: what is shown, and from where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_gradprune.errors import ConfigError
from labs.convergence import overview


def row(method: str, bits: float, gap: float, **other: Any) -> dict[str, Any]:
    return {
        "method": method,
        "kind": "update",
        "bits_per_param": bits,
        "gap_pct": gap,
        "gap_std": 0.4,
        "seeds": 4,
        "stopped_at": None,
    } | other


@pytest.fixture
def result(tmp_path: Path) -> Path:
    rows = [
        row("dense", 32.0, 0.0, kind="dense"),
        row("dense enough", 0.5, 0.1),
        row("beaten", 0.6, 0.2),
        row("sparse", 0.03, 0.9),
        row("one seed", 0.01, 0.0, seeds=1, gap_std=None),
        row("ended", 0.01, 0.0, stopped_at=7),
        row("other rate", 0.01, 0.0),
        row("peer", 1.0, 2.0, kind="onebit_adam"),
    ]
    methods = [{"name": r["method"], "sync_every": 5} for r in rows]
    methods[6]["train"] = {"lr": 0.1}
    path = tmp_path / "case.json"
    path.write_text(
        json.dumps(
            {
                "rows": rows,
                "grid": {"methods": methods},
                "train": {"batch": 4, "lr": 0.002},
                "model": {"context": 64},
                "workers": 2,
                "numel": 1_000_960,
                "steps": 3000,
            }
        )
    )
    return path


def test_a_case_shows_what_was_repeated_at_its_own_rate(result: Path) -> None:
    case = overview.case_of(result)
    assert (case["name"], case["page"]) == ("2 islands, 1M, 256 tokens, CPU", "case.md")
    assert [r["method"] for r in overview.ours(case)] == ["dense enough", "sparse"]
    assert [r["method"] for r in overview.peers(case)] == ["peer"]
    assert overview.ours(case)[0]["error"] == 0.2
    assert overview.ours(case)[0]["settings"]["sync_every"] == 5


def test_page_and_picture(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    out = result.with_name("all.json")
    out.with_suffix(".md").write_text("# old\n## Remarks\nKept.\n")
    monkeypatch.setattr("sys.argv", ["overview", "--out", str(out), str(result)])
    assert overview.main() == 0
    text = out.with_suffix(".md").read_text()
    name = "[2 islands, 1M, 256 tokens, CPU](case.md)"
    assert f"| {name} | sparse | 0.03 | +0.90 | 0.20 | 4 |" in text
    assert f"| {name} | peer: peer | 1 | +2.00 | 0.20 | 4 |" in text
    assert "beaten" not in text
    assert text.endswith("## Remarks\nKept.\n")
    assert out.with_suffix(".png").is_file()
    assert str(result.parent) not in text


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"other.json must be a result of a grid: KeyError"):
        overview.case_of(path)
