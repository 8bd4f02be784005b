"""The bound on what following the link gains: an oracle is never worse, and the file is whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import control_bound as bound
from ds_gradprune.records import CHUNK_NUMEL

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("by", ["steps", "time"])
@pytest.mark.parametrize("prune", ["gradient", "update"])
def test_oracle_is_no_worse_than_any_static_density(prune: str, by: bound.By) -> None:
    one = bound.row("micro, 12 times as fast", prune, "1gbit,20mbit", by, 300)
    assert 1.0 <= one["gain_static"] <= min(one["gain_first"], one["gain_slowest"])
    assert one["oracle"][0] > one["static"] > one["oracle"][1]


def test_on_one_rate_there_is_nothing_to_gain() -> None:
    one = bound.row("micro, measured", "gradient", "100mbit,100mbit", "steps", 300)
    assert one["gain_static"] == one["gain_first"] == one["gain_slowest"] == 1.0


def test_dense_takes_dense_steps_and_a_rate_counts_by_its_share() -> None:
    fast = bound.prices_at("nano, measured", 1e9)
    slow = bound.prices_at("nano, measured", 1e6)
    ks = [CHUNK_NUMEL, CHUNK_NUMEL]
    fast_s, slow_s = fast.step_s(CHUNK_NUMEL), slow.step_s(CHUNK_NUMEL)
    by_steps = bound.loss_s([fast, slow], ks, "update", 300, "steps")
    by_time = bound.loss_s([fast, slow], ks, "update", 300, "time")
    assert by_steps == pytest.approx((fast_s + slow_s) / 2)
    assert by_time == pytest.approx(1.0 / (1.0 / fast_s + 1.0 / slow_s))


def test_command_writes_page_and_last_line(tmp_path: Path) -> None:
    out = tmp_path / "bound.json"
    command = [sys.executable, "benchmarks/control_bound.py", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout.splitlines()[-1])
    cases = len(bound.MACHINES) * 2 * len(bound.ROUTES) * 2
    assert len(document["rows"]) == cases
    assert json.loads(out.read_text())["rows"] == document["rows"]
    assert out.with_suffix(".md").read_text().count("| nano, measured |") == cases // 4


def test_age_below_one_is_refused() -> None:
    command = [sys.executable, "benchmarks/control_bound.py", "--age", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--age must be at least 1, got 0." in done.stderr
