"""benchmarks/gather.py runs on a bed and says no exchange is faster than its link."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.netbed import requirements

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.netns
@pytest.mark.timeout(120)
@pytest.mark.skipif(requirements.missing() is not None, reason=requirements.missing() or "")
def test_both_ways_are_measured_and_neither_beats_the_link() -> None:
    words = ["--rates", "50mbit", "--sizes", "1000,700000", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/gather.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert [(row["payload_bytes"], row["way"]) for row in results] == [
        (1000, "one piece"),
        (1000, "segments"),
        (700000, "one piece"),
        (700000, "segments"),
    ]
    for row in results[2:]:
        assert row["least_s"] == pytest.approx(0.112)
        # But for the bucket of a shaper, 64 KiB at each end.
        assert row["exchange_s"] > 8 * (700000 - 2 * 65536) / 50e6
