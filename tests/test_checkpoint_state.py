"""One rank's file beside DeepSpeed's: whole or not at all, and only what can be read again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_gradprune.errors import CheckpointError
from ds_gradprune.integration import checkpoint


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "tag" / "state.pt"
    state = {"step": 3, "own": [torch.arange(3.0)], "island": {"lr": (0.1, None), "on": True}}
    checkpoint.save(str(path), state)
    read = torch.load(path, weights_only=True)["pruning"]
    assert torch.equal(read.pop("own")[0], torch.arange(3.0))
    assert read == {"step": 3, "island": {"lr": (0.1, None), "on": True}}


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"schedule": {"lambda": abs}}, r"state\.schedule\.lambda must be .* got builtin_function"),
        ({"lr": [1.0, torch.Size]}, r"state\.lr\[1\] must be"),
        ({"lr": Path("x")}, r"state\.lr must be .* got PosixPath"),
    ],
)
def test_what_could_not_be_read_again_is_not_saved(value: Any, where: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=where):
        checkpoint.save(str(tmp_path / "tag" / "state.pt"), value)
    assert list(tmp_path.iterdir()) == []


def test_torchs_own_schedules_can_be_saved(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 2, 5])
    assert isinstance(schedule.state_dict()["milestones"], Counter)
    path = tmp_path / "state.pt"
    checkpoint.save(str(path), {"lr_scheduler": schedule.state_dict()})
    read = torch.load(path, weights_only=True)["pruning"]["lr_scheduler"]
    schedule.load_state_dict(read)
    assert schedule.milestones == Counter([2, 2, 5])
