"""The memory bound of error feedback, measured on the product's own classes."""

from __future__ import annotations

import json
import subprocess
import sys

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
