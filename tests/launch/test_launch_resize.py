"""launch/train.py goes on with another number of ranks: data, log and steps have no seam."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import scripts
from tests.helpers.forked import Case, Nursery
from tests.helpers.scripts import arguments, block, log_of

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(200)]

SIZES = ((2, 6), (3, 10), (1, 13), (4, 18))
"""Ranks, and the step after which they stop."""


@pytest.mark.parametrize("prune", ["update", "gradient"])
def test_a_run_goes_on_with_other_numbers_of_ranks(
    prune: str, nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    """Another number was refused by launch/train.py, though the checkpoint could be read."""
    out = tmp_path / "out"
    config = scripts.write_config(tmp_path / "config.json", **block(prune=prune, throttle=None))
    flags = {"config": str(config), "eval_every": "50"}
    for ranks, steps in SIZES:
        given = arguments(here, out, **(flags | {"steps": str(steps)}))
        given += ["--resume"] if ranks != SIZES[0][0] else []
        environ = {"MASTER_PORT": scripts.free_port()}
        endings = nursery.run(Case([given] * ranks, [], environ))
        assert [ending.code for ending in endings] == [0] * ranks, endings[0].told
        assert json.loads((out / "result.json").read_text())["steps"] == steps
    assert "note: 1 ranks have trained so far, now 4: a step takes 16 sequences" in endings[0].told
    assert [entry["step"] for entry in log_of(out)] == list(range(1, SIZES[-1][1] + 1))
    result = json.loads((out / "result.json").read_text())
    assert result["val_loss"] < result["val_loss_start"]
