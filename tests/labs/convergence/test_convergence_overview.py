"""The picture of several grids: what is shown, and from where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_gradprune.errors import ConfigError
from labs.convergence import overview, recipes


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
        row("the default", 0.06, 0.7),
        row("dense enough", 0.5, 0.1),
        row("beaten", 0.6, 0.2),
        row("sparse", 0.03, 0.9),
        row("one seed", 0.01, 0.0, seeds=1, gap_std=None),
        row("ended", 0.01, 0.0, stopped_at=7),
        row("other rate", 0.01, 0.0),
        row("peer", 1.0, 2.0, kind="onebit_adam"),
    ]
    methods: list[dict[str, Any]] = [
        {"name": r["method"], "sync_every": 5, "density": 0.03125, "value_bits": 2} for r in rows
    ]
    for method in methods:
        if method["name"] != "the default":
            method["slow_momentum"] = 1.0
        method["update_scale"] = 2.0
    methods[-2]["train"] = {"lr": 0.1}
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
    assert case["name"] == "2 islands, 1M, 256 tokens"
    (default,) = recipes.defaults(case)
    assert (default["method"], default["recipe"]) == ("the default", "every 5")
    assert (default["error"], default["page"]) == (0.2, "case.md")
    assert [r["method"] for r in recipes.others(case)] == ["dense enough", "sparse"]
    assert [r["method"] for r in recipes.peers(case)] == ["peer"]


@pytest.mark.parametrize(
    ("settings", "islands", "name"),
    [
        ({"density": 0.01}, 2, "every step"),
        ({"density": 0.01, "scale": 2.0}, 4, "every step"),  # as the first laboratory named it
        ({"density": 0.01, "update_scale": 1.0}, 2, None),
        (
            {"density": 0.03125, "value_bits": 2, "sync_every": 10, "update_scale": 2.0},
            2,
            "every 10",
        ),
        ({"density": 0.03125, "value_bits": 2, "sync_every": 10}, 2, None),  # the root of two
        ({"density": 0.03125, "value_bits": 2, "sync_every": 10}, 4, "every 10"),
        ({"density": 0.03125, "value_bits": 2, "sync_every": 10, "residual": "used"}, 4, None),
        ({"density": 0.25, "value_bits": 2, "sync_every": 10}, 4, None),
    ],
)
def test_recipes_are_those_with_the_product_s_scale(
    settings: dict[str, Any], islands: int, name: str | None
) -> None:
    assert recipes.recipe({"kind": "update", "settings": settings}, islands) == name


def test_pages_of_one_case_are_one_line(result: Path) -> None:
    cases = [overview.case_of(result), overview.case_of(result)]
    (case,) = overview.merged(cases)
    assert len(case["rows"]) == 2 * len(cases[0]["rows"])
    assert len(recipes.defaults(case)) == 1


def test_fine_tuning_is_paired_by_seed(tmp_path: Path) -> None:
    def run(method: str, seed: int, loss: float, **other: Any) -> dict[str, Any]:
        base = {"kind": "full", "tokens": 1024, "trained": 134_515_008, "steps": 300}
        return (
            base
            | {
                "method": method,
                "seed": seed,
                "val_loss": loss,
                "bits_per_param": 0.03,
            }
            | other
        )

    runs = [
        run("dense", 0, 2.0),
        run("dense", 1, 4.0),
        run("every 10", 0, 2.02),
        run("every 10", 1, 4.08),
        run("dense", 0, 9.0, kind="lora"),
    ]
    path = tmp_path / "finetune.json"
    path.write_text(json.dumps({"tuned": runs, "cpu": []}))
    case = overview.case_of(path)
    assert case["name"] == "2 islands, 135M fine-tuned, 1,024 tokens"
    (row,) = recipes.defaults(case)
    assert row["gap_pct"] == pytest.approx(1.5)  # 1 and 2 %
    assert row["error"] == pytest.approx(0.5)
    adapters = [run | {"kind": "lora", "trained": 4_884_480} for run in runs[:4]]
    path.write_text(json.dumps({"tuned": adapters}))
    case = overview.case_of(path)
    assert case["name"] == "2 islands, 4.88M of LoRA fine-tuned, 1,024 tokens"
    assert [row["gap_pct"] for row in case["rows"]] == pytest.approx([1.5])


def test_page_and_picture(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    out = result.with_name("all.json")
    out.with_suffix(".md").write_text("# old\n## Remarks\nKept.\n")
    monkeypatch.setattr("sys.argv", ["overview", "--out", str(out), str(result)])
    assert overview.main() == 0
    text = out.with_suffix(".md").read_text()
    name = "[2 islands, 1M, 256 tokens](case.md)"
    assert f"| {name} | default: every 5 | 0.06 | +0.70 | 0.20 | 4 |" in text
    assert f"| {name} | other: sparse | 0.03 | +0.90 | 0.20 | 4 |" in text
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
