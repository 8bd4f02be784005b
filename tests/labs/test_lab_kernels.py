"""The benchmark of the kernels runs, and its last line is the document that is asked for."""

from __future__ import annotations

import json
import sys

import pytest

from ds_gradprune.native.library import kernels
from labs import kernels as lab


@pytest.mark.skipif(kernels() is None, reason="needs the native kernels, so a C++ compiler")
def test_a_small_run_ends_in_a_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "kernels --numel 200000 --density 0.05 --threads 1 --rounds 1"
    monkeypatch.setattr(sys, "argv", arguments.split())
    lab.main()
    *lines, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert len(lines) == len(document["cells"]) == 1
    assert document["cpu_passes"] == document["cells"][0]["passes"] > 0
    assert document["cpu_vs_before"] is None
    assert document["gpu_fraction_of_copy"] is None
