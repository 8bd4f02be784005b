"""launch/train.py on two hosts whose link fails: for a moment, and for good."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import netbed, scripts
from tests.helpers.scripts import arguments, block
from tools.netbed import Bed

pytestmark = [*netbed.netns, pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(200)]

TIMEOUT_S, OUTAGE_S = 8.0, 2.0
LATE_S = 5.0
"""What a survivor may need beyond `timeout_s`."""
NOBODY = "02:00:00:00:00:99"


def start(bed: Bed, given: list[str]) -> list[subprocess.Popen[str]]:
    """One rank on each host, as mpirun would start them."""
    return [
        host.popen(
            [sys.executable, "launch/train.py", *given],
            cwd=scripts.ROOT,
            env=scripts.script_environ()
            | bed.environ(DS_ACCELERATOR="cpu", PYTHONPATH=str(scripts.ROOT))
            | {
                "OMPI_COMM_WORLD_RANK": str(rank),
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
                "MASTER_ADDR": bed.hosts[0].address,
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, host in enumerate(bed.hosts)
    ]


@pytest.mark.parametrize("loss", ["one direction", "both"])
def test_a_link_that_comes_back_is_waited_for_and_one_that_stays_away_is_told(
    loss: str, here: Path, tmp_path: Path
) -> None:
    """Rank 0 told in time, and the other one hung: its question to rank 0's store had no end."""
    out = tmp_path / "out"
    ours = block(timeout_s=TIMEOUT_S, prune="update", throttle=None)
    path = scripts.write_config(tmp_path / "config.json", **ours)
    given = arguments(here, out, config=str(path), steps="100000", eval_every="100000")
    with Bed(hosts=2, rate="100mbit") as bed:
        ranks = start(bed, given)
        scripts.wait_for_step(out / "log.jsonl", 5, ranks)
        bed.set_link(up=False, host=0)
        if loss == "one direction":
            time.sleep(OUTAGE_S)
            bed.set_link(up=True, host=0)
            done = len(scripts.log_of(out))
            scripts.wait_for_step(out / "log.jsonl", done + 5, ranks)
            assert [rank.poll() for rank in ranks] == [None, None]
            address = bed.hosts[1].address
            words = ["ip", "neigh", "replace", address, "lladdr", NOBODY, "dev", "eth0"]
            bed.hosts[0].run([*words, "nud", "permanent"], check=True)
        began_s = time.monotonic()
        told = scripts.finish(ranks, timeout_s=60.0)
        assert time.monotonic() - began_s < TIMEOUT_S + LATE_S
    assert [rank.returncode for rank in ranks] == [2, 2], told
    for text in told:
        assert text.count("error: ") == 1
        assert "Traceback" not in text
        assert "steps were done (rank 0 on host-0, rank 1 on host-1). There is no" in text
