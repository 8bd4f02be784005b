"""The codec benchmark runs, and its last line is the promised document."""

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


def run(root: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    script = str(root / "labs" / "codec.py")
    monkeypatch.setattr(sys, "argv", [script, "--repeats", "5", "--warmup", "1", *flags])
    runpy.run_path(script, run_name="__main__")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="default"),
        pytest.param(("--density", "1.0", "--value-bits", "32"), id="dense"),
        pytest.param(("--value-bits", "4", "--world-size", "3"), id="4bit"),
    ],
)
def test_last_line_is_the_document(
    repo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
) -> None:
    run(repo_root, monkeypatch, "--numel", "60000", *flags)
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    for name in ("select_s", "encode_s", "decode_s", "copy_s", "topk_baseline_s"):
        assert 0.0 < result["fastest"][name] <= result[name]
    assert 50_000 < result["numel"] < 70_000
    assert result["density"] == (1.0 if "--density" in flags else 0.05)
    assert result["payload_bytes"] > 64
    assert [(row["k"], row["codec"]) for row in result["sizes"]] == [
        (k, name) for k in (4, 41, 205, 1024) for name in ("fp32", "bf16", "4bit", "2bit")
    ]
    at_1_percent = {r["codec"]: r["bits_per_kept"] for r in result["sizes"] if r["k"] == 41}
    # 8.54 bits of an index and 4 of a value, two scales of 16 bits for 128; padding.
    assert 12.7 < at_1_percent["4bit"] < 13.3
    assert all(row["bits_per_index"] < 12.0 for row in result["sizes"])  # 12 plain bits of a place
    assert {"commit", "machine"} <= set(result)
    assert any("GB/s" in line for line in table)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--density", "0"), "--density must be in (0, 1]"),
        (("--repeats", "4"), "--repeats must be at least 5"),
    ],
)
def test_wrong_flags_are_refused(
    repo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(repo_root, monkeypatch, *flags)
    assert message in capsys.readouterr().err
