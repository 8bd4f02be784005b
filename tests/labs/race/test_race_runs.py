"""Small real runs of the race, by its command."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from labs.race.figures import CONTRACT
from tools.netbed import requirements

ROOT = Path(__file__).resolve().parents[3]


def ethernet(out: Path, *words: str) -> tuple[dict, dict]:
    """The last line of a run, and its file."""
    sizes = ["--steps", "4", "--timing-steps", "3", "--repeats", "1", "--batch", "2"]
    text = ["--text", str(ROOT / "README.md"), "--out", str(out), "--no-plots"]
    done = subprocess.run(
        [sys.executable, "benchmarks/ethernet.py", *sizes, *text, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), json.loads(out.read_text())


PEERS = [
    "dense_fp32",
    "dense_bf16",
    "bf16_hook",
    "powersgd_1",
    "zeroone_adam_4",
    "ours",
    "ours_update",
]
"""One of every kind: DeepSpeed, DDP, simulated, pruned gradients, islands."""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_peers_train_alike_on_loopback(tmp_path) -> None:
    out = tmp_path / "a.json"
    words = ["--extend", "1", "--eval-sequences", "6", "--methods", ",".join(PEERS)]
    last, full = ethernet(out, "--bed", "none", *words)
    assert last["break_even_mbit"] is None
    rows = {row["method"]: row for row in last["results"]}
    assert list(rows) == PEERS
    for row in rows.values():
        assert tuple(row) == CONTRACT
        assert (row["rate_mbit"], row["wire_bytes"], row["hosts"]) == (None, None, 2)
        assert row["step_time_s"] > 0
    # Same weights, same tokens: the loss before the first step is the same to the last bit.
    assert len({tuple(run["validations"][0]) for run in full["runs"]}) == 1
    # One step that is dense everywhere later, what bf16 rounds off a gradient, 2^-9, is left of the
    # change that the step made, and 1e-4 for sums in another order.
    first, *_ = (run["loss"] for run in full["runs"] if run["method"] == "dense_fp32")
    for run in full["runs"]:
        assert run["loss"][0] == pytest.approx(first[0], rel=1e-5)
        assert run["loss"][1] == pytest.approx(first[1], abs=abs(first[0] - first[1]) / 2**9 + 1e-4)
    assert out.with_suffix(".md").read_text().startswith("# Ethernet: 2 hosts, nano")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.netns
@pytest.mark.timeout(300)
@pytest.mark.skipif(requirements.missing() is not None, reason=requirements.missing() or "")
def test_bytes_at_the_interface_agree_with_our_own_count(tmp_path) -> None:
    names = ["topk_0.05", "zeroone_adam_4"]
    last, full = ethernet(
        tmp_path / "b.json", "--rates", "20mbit", "--methods", ",".join(["dense_fp32", *names])
    )
    rows = {(row["method"], row["rate_mbit"]): row for row in full["results"]}
    assert len(last["results"]) == 6
    for name, rate in itertools.product(names, (20.0, None)):
        pruned = rows[name, rate]
        # 66 bytes of headers on 1448 of payload, as much again at most for acknowledgements of what
        # is received, and 5 % for everything else.
        overhead = 1.05 + 2 * 66 / 1448
        assert 1.0 <= pruned["wire_bytes"] / pruned["payload_bytes"] <= overhead
        # a fifth of what dense sends is far more than 5 % of the values with their places
        assert pruned["wire_bytes"] < 0.2 * rows["dense_fp32", rate]["wire_bytes"]
    # A shaper lets nothing through early but its bucket, 64 KiB at each end of the link.
    # However busy the machine is, it cannot be faster than that.
    dense = rows["dense_fp32", 20.0]
    assert dense["exposed_comm_s"] > 8 * (dense["wire_bytes"] - 2 * 65536) / 20e6 * 0.9
    assert full["break_even_method"] == "topk_0.05"
    (checked,) = full["break_even_checks"]
    assert checked["dense_measured_s"] == dense["step_time_s"]
