"""A user's own script whose other rank is frozen or gone: it ends in time, and says why.

Each of these waits had torch's half hour, or no end at all.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import scripts
from tests.helpers.forked import Case, Doom, Nursery

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(100)]

OWN = "tests.helpers.plain_main"
ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}
BLOCK = {"timeout_s": 2.0, "window_size": 4, "warmup_steps": 2, "min_numel": 64}


def words(folder: Path, prune: str) -> list[str]:
    """Configuration and folder of checkpoints."""
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG | {"gradient_pruning": BLOCK | {"prune": prune}}))
    return [str(path), str(folder / "checkpoints")]


@pytest.mark.parametrize(
    ("prune", "doom", "flags", "code", "told"),
    [
        (
            "update",
            Doom(0, "ds_gradprune.deepspeed.groups:Groups._mine", 1, "stop"),
            [],
            2,
            "error: making process groups must end within 7 s",
        ),
        (
            "gradient",
            Doom(1, f"{ENGINE}.__init__", 1, "stop"),
            ["--opens"],
            1,
            "TransportTimeout: rank 0 of 2 on HOST has lost another rank while starting the engine",
        ),
        (
            "update",
            Doom(0, f"{ENGINE}._save_checkpoint", 1, "stop"),
            ["--opens"],
            1,
            "TransportTimeout: rank 1 of 2 on HOST has lost another rank while saving a checkpoint",
        ),
        (
            "update",
            Doom(1, f"{OWN}:validate", 1, "stop"),
            ["--opens", "--watch"],
            1,
            "TransportTimeout: rank 0 of 2 on HOST has lost another rank while training",
        ),
    ],
    ids=["attach", "engine", "save", "validation"],
)
def test_a_script_of_ones_own_never_waits_in_silence(
    prune: str,
    doom: Doom,
    flags: list[str],
    code: int,
    told: str,
    nursery: Nursery,
    tmp_path: Path,
) -> None:
    given = [*words(tmp_path, prune), "5", *flags]
    case = Case([given] * 2, [doom], {"MASTER_PORT": scripts.free_port()}, 30.0, f"{OWN}:main")
    ending = nursery.run(case)[1 - doom.rank]
    assert ending.code == code, ending.told
    before, _, after = told.partition("HOST")
    [line] = [line for line in ending.told.splitlines() if before in line]
    assert after in line


def test_a_checkpoint_is_named_when_all_ranks_have_written_it(
    nursery: Nursery, tmp_path: Path
) -> None:
    """DeepSpeed's rank 0 names it before it knows of the others."""
    commit = "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine"
    doom = Doom(1, f"{commit}.commit", 2, "kill")
    given = [*words(tmp_path, "update"), "9"]
    case = Case([given] * 2, [doom], {"MASTER_PORT": scripts.free_port()}, 30.0, f"{OWN}:main")
    ending = nursery.run(case)[0]
    assert "has lost another rank while saving a checkpoint" in ending.told
    assert (tmp_path / "checkpoints" / "global_step8").is_dir()
    assert (tmp_path / "checkpoints" / "latest").read_text() == "global_step4"


def test_what_a_script_of_ones_own_knows_is_compared(nursery: Nursery, tmp_path: Path) -> None:
    """Seed, steps and data cannot be seen in an engine; ranks with others trained on, or hung."""
    ranks = [[*words(tmp_path, "update"), steps] for steps in ("5", "6")]
    case = Case(ranks, [], {"MASTER_PORT": scripts.free_port()}, 30.0, f"{OWN}:main")
    for ending in nursery.run(case):
        assert ending.code == 1
        assert "RankMismatchError: all ranks must run the same thing" in ending.told
        assert "given steps is 5 on rank 0" in ending.told
