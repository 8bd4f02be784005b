"""`register()` and the Hugging Face Trainer: the same block, nothing else to change."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks import run_processes

pytest.importorskip("accelerate", reason="the Hugging Face Trainer needs accelerate")

BLOCK = {
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
    steps, densities, losses, _ = zip(*one["seen"], strict=True)
    assert list(steps) == list(range(1, 9))
    assert densities[:2] == (1.0, 1.0)
    assert set(densities[2:]) == {205 / 4096}
    # The Trainer logs the same mean over ranks and micro-steps, rounded to four digits or more.
    assert one["logged"] == [pytest.approx(loss, abs=1e-3) for loss in losses]
    assert losses[-1] < losses[0]
