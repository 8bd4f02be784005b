"""The benchmark of where islands fall behind: its measures, and the promised last line."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import island_gap
from benchmarks.convergence_lab.base import DenseSimulation, Setting
from benchmarks.convergence_lab.gpt import Gpt, validation_loss
from benchmarks.convergence_lab.grid import Model, Train
from benchmarks.convergence_lab.text import Text

GRID = {
    "question": "Does it run?",
    "model": {"n_layer": 1, "n_head": 1, "n_embd": 16, "context": 8},
    "train": {"batch": 1, "warmup_steps": 2, "lr_warmup_steps": 1},
    "methods": [{"kind": "update", "name": "update", "scale_at": "shared"}],
}


@pytest.fixture(autouse=True)
def _keep_thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(repo_root: Path) -> Text:
    return Text(repo_root / "README.md", 8)


@pytest.fixture
def setting(text: Text) -> Setting:
    shape = Model(n_layer=1, n_head=1, n_embd=16, context=8)
    train = Train(batch=2, lr_warmup_steps=1, lr=0.01)
    return Setting(Gpt(shape, text.vocab_size), train, workers=2, steps=60, seed=0)


def test_an_anneal_learns_from_where_it_starts(setting: Setting, text: Text) -> None:
    simulation = DenseSimulation(setting)
    first = simulation.shared[0].clone()
    before = validation_loss(setting.gpt, first, text.validation())
    after = island_gap.annealed(setting, text, first, 1, 60)
    assert after < before - 0.1
    assert torch.equal(first, simulation.shared[0])  # the run itself is left alone
    still = dataclasses.replace(setting, train=Train(lr=1e-12, batch=2))
    assert island_gap.annealed(still, text, first, 1, 10) == pytest.approx(before, abs=1e-6)


def test_squares_grow_with_noise_in_the_own_weights(setting: Setting, text: Text) -> None:
    class Noisy(DenseSimulation):
        def seen(self) -> torch.Tensor:
            generator = torch.Generator().manual_seed(1)
            rows = self.shared.expand(2, -1)
            return rows + 0.5 * torch.randn(rows.shape, generator=generator)

    assert island_gap.squares(setting, text, DenseSimulation(setting)) == 1.0
    assert island_gap.squares(setting, text, Noisy(setting)) > 1.5


def test_last_line_is_the_document(
    tmp_path: Path,
    repo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(GRID))
    flags = ["--grid", str(path), "--text", str(repo_root / "README.md"), "--steps", "12"]
    flags += ["--workers", "2", "--every", "6", "--anneal", "3"]
    monkeypatch.setattr(sys, "argv", ["island_gap.py", *flags])
    assert island_gap.main() == 0
    *table, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert [(row["method"], row["step"]) for row in rows] == [
        (method, step) for method in ("dense", "update") for step in (6, 12)
    ]
    assert len(table) == 2 + len(rows)
    for row in rows:
        is_dense = row["method"] == "dense"
        assert (row["own"] == pytest.approx(row["shared"], abs=1e-6)) == is_dense
        assert (row["squares"] == 1.0) == is_dense


def test_faults_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--grid", str(tmp_path / "none.json"), "--text", "x", "--steps", "9"]
    monkeypatch.setattr(sys, "argv", ["island_gap.py", *flags])
    assert island_gap.main() == 2
    assert "none.json must be a readable JSON file" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["island_gap.py", *flags, "--every", "0"])
    with pytest.raises(SystemExit, match="2"):
        island_gap.main()
    assert "--every must be at least 1, got 0" in capsys.readouterr().err
