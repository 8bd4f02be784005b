"""Islands on hosts of their own, of which two stop hearing each other."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import netbed
from tests.helpers.crew_main import TIMEOUT_S
from tests.helpers.ranks import ROOT
from tools.netbed import Bed

pytestmark = [*netbed.netns, pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(90)]

HOSTS, LATE_S = 3, 5.0
NOBODY = "02:00:00:00:00:99"


def test_a_direction_that_is_lost_between_two_costs_a_time_out_and_five_seconds(
    tmp_path: Path,
) -> None:
    """It took a minute: gloo waits for a connection five times as long as its time-out."""

    def told(island: int) -> dict[str, Any]:
        path = tmp_path / f"told{island}"
        return json.loads(path.read_text()) if path.exists() else {"calls": 0, "fault": ""}

    def until(holds: Any) -> None:
        deadline_s = time.monotonic() + 30.0
        while not holds():
            assert time.monotonic() < deadline_s, [told(island) for island in range(HOSTS)]
            time.sleep(0.05)

    with Bed(hosts=HOSTS, rate="100mbit") as bed:
        environ = bed.environ(DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT))
        processes = []
        for island, host in enumerate(bed.hosts):
            given = [bed.hosts[0].address, str(island), str(HOSTS), str(tmp_path)]
            words = [sys.executable, "-m", "tests.helpers.crew_main", *given]
            processes.append(host.popen(words, cwd=ROOT, env=environ))
        until(lambda: all(told(island)["calls"] > 20 for island in range(HOSTS)))
        words = ["ip", "neigh", "replace", bed.hosts[2].address, "lladdr", NOBODY, "dev", "eth0"]
        bed.hosts[1].run([*words, "nud", "permanent"], check=True)
        until(lambda: told(2)["fault"])
        done = told(0)["calls"]
        until(lambda: told(0)["calls"] > done + 20)
        (tmp_path / "stop").touch()
        for process in processes:
            process.wait(20.0)
    found = [told(island) for island in range(HOSTS)]
    assert "islands 0, 1 have gone on without island 2" in found[2]["fault"]
    for island in (0, 1):
        assert found[island]["took_part"] == [0, 1]
        assert found[island]["longest_s"] < TIMEOUT_S + LATE_S
