"""Memory: the bound of error feedback, and what a rank of an island holds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from labs import zero_memory
from tests.helpers.ranks import ROOT


def test_residual_is_all_a_step_holds_and_the_next_one_all_it_stages() -> None:
    done = subprocess.run(
        [sys.executable, "labs/memory.py", "--density", "0.05"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["residual_bytes"] == 4 * result["numel"]
    # The residual of the open step; nothing is larger.
    assert 0 < result["largest_tensor_bytes"] <= result["model_bytes"]
    assert 0 < result["numpy_peak_bytes_both_ranks"] < 2 * result["model_bytes"]


@pytest.mark.distributed
@pytest.mark.zero
def test_a_rank_of_an_island_holds_its_part_of_the_shared_weights(
    capsys: pytest.CaptureFixture[str],
) -> None:
    zero_memory.main(["--stages", "3", "--layers", "2", "--width", "512", "--ways", "islands"])
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["held_bytes_per_parameter"] == 4 / zero_memory.RANKS_PER_ISLAND
    # Own part, two moments and shared weights at the least.
    assert row["rest_bytes_per_parameter"] >= 4 * 4 / zero_memory.RANKS_PER_ISLAND
    assert row["peak_bytes_per_parameter"] >= row["rest_bytes_per_parameter"]
