"""The GPU check runs on the CPU at a tiny size, and what fails is told beside the rest."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from labs import gpu_check
from labs.gpu.launch import Settings, run
from labs.gpu.parts import PARTS


def found_by(folder: Path, cases: list[str], left_s: float = 60.0) -> dict[str, Any]:
    settings = Settings(folder, "cpu", True, time.monotonic() + left_s)
    return run("bits", PARTS["bits"], cases, settings, lambda _: None)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_tiny_check_ends_in_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "check.json"
    arguments = ["--tiny", "--device", "cpu", "--jobs", "1", "--parts", "bits", "islands"]
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(path), *arguments])
    with pytest.raises(SystemExit, match="False"):  # code 0
        gpu_check.main()
    document = json.loads(path.read_text())
    assert document["failed"] == []
    assert list(document["parts"]) == ["bits", "islands"]
    (island,) = document["parts"]["islands"]["cases"].values()
    assert island["ok"]
    assert island["checks"] >= 5
    assert 0 < 3 * island["wire_bytes"] < island["dense_bytes"]
    assert "islands" in capsys.readouterr().out


def test_a_process_that_dies_leaves_its_last_words(tmp_path: Path) -> None:
    found = found_by(tmp_path, ["no such case"])
    assert not found["ok"]
    assert "KeyError" in found["cases"]["no such case"]["fault"]["rank 0"]


def test_what_there_was_no_time_for_is_told(tmp_path: Path) -> None:
    found = found_by(tmp_path, ["move"], left_s=-1.0)
    assert found["cases"] == {"move": {"ok": False, "fault": "not reached: no time was left"}}
    assert not found["ok"]
