"""The page of what a checkpoint costs says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from labs import saving


def test_the_page_is_that_of_its_document(repo_root: Path) -> None:
    path = repo_root / "results" / "saving_cpu_202611.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    text = saving.page(document)
    assert text == path.with_suffix(".md").read_text(encoding="utf-8")
    assert document["modes"].keys() == set(saving.MODES)
    # With islands every rank has its own weights and Adam's two moments; else a residual.
    numel = document["parameters"]
    for mode, bytes_each in (("update", 12), ("gradient", 4)):
        ours = document["modes"][mode]["our_bytes"] / saving.RANKS
        assert bytes_each * numel < ours < 1.01 * bytes_each * numel
