"""The benchmark of level sets runs, and its last line is the promised document."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _keep_thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_last_line_is_the_document(
    repo_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    script = str(repo_root / "benchmarks" / "levels.py")
    flags = ["--text", str(repo_root / "README.md"), "--steps", "60", "--k", "41", "--batch", "1"]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    runpy.run_path(script, run_name="__main__")
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)["squared_error"]
    sources = ["gradient k=41", "gradient dense", "update k=41", "update dense"]
    assert list(result) == [*sources, "normal", "Laplace", "Student t3"]
    for row in result.values():
        # The codec writes what its description says: its table of steps grows by about a fifth.
        assert row["4 bits, codec"] == pytest.approx(
            row["4 bits, band: steps grow by 1.2"], rel=0.2
        )
        assert row["4 bits, codec"] < row["2 bits, codec"]
    # The survivors of known distributions: two ends beat one scale by far.
    for name in ("normal", "Laplace", "Student t3"):
        assert result[name]["4 bits, codec"] < 0.5 * result[name]["4 bits, scale: uniform"]
    assert len(table) == 1 + len(result["normal"])


def test_too_few_steps_are_refused(
    repo_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(repo_root / "benchmarks" / "levels.py")
    monkeypatch.setattr(sys, "argv", [script, "--text", "x", "--steps", "9"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(script, run_name="__main__")
    assert "--steps must be at least 60" in capsys.readouterr().err
