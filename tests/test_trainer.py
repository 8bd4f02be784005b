"""`register()` and the Hugging Face Trainer: the same block, nothing else to change."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.ranks import run_processes

pytest.importorskip("accelerate", reason="the Hugging Face Trainer needs accelerate")

BLOCK = {
    "prune": "gradient",
    "warmup_steps": 2,
    "ramp_steps": 0,
    "window_size": 4,
    "density": {"initial": 0.05, "min": 0.05, "max": 0.05},
}


@pytest.mark.distributed
@pytest.mark.parametrize("gas", [1, 2])
def test_trainer_trains_over_pruned_gradients(tmp_path: Any, gas: int) -> None:
    one, other = run_processes(
        2,
        "tests.helpers.trainer_main",
        "train",
        {"folder": str(tmp_path), "block": BLOCK, "gas": gas},
    )
    assert one["seen"] == other["seen"]
    steps, densities, losses, *_ = zip(*one["seen"], strict=True)
    assert list(steps) == list(range(1, 9))
    assert densities[:2] == (1.0, 1.0)
    assert set(densities[2:]) == {205 / 4096}
    # The Trainer logs the same mean over ranks and micro-steps, rounded to four digits or more.
    assert one["logged"] == [pytest.approx(loss, abs=1e-3) for loss in losses]
    assert losses[-1] < losses[0]


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_trainer_trains_evaluates_saves_and_resumes_islands(tmp_path: Any) -> None:
    block = BLOCK | {"prune": "update"}
    arguments = {
        "folder": str(tmp_path),
        "block": block,
        "gas": 2,
        "spread": True,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    one, other = run_processes(2, "tests.helpers.trainer_main", "train", arguments)
    assert [row[:4] for row in one["seen"]] == [row[:4] for row in other["seen"]]
    own, own_other = ([row[4] for row in rank["seen"]] for rank in (one, other))
    assert [a == b for a, b in zip(own, own_other, strict=True)] == [True] * 2 + [False] * 6
    assert one["evaluated"] == other["evaluated"]
    # What the Trainer saved as the model is what all islands share.
    saved = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert saved
    for name, value in saved.items():
        assert torch.equal(value, one["final"][name])
        assert torch.equal(value, other["final"][name])
    # From the middle once more: the same second half.
    shutil.rmtree(tmp_path / "checkpoint-8")
    again = run_processes(2, "tests.helpers.trainer_main", "train", arguments | {"resume": True})
    for before, after in zip((one, other), again, strict=True):
        assert after["seen"] == before["seen"][4:]
        assert after["evaluated"] == before["evaluated"]
