"""The laboratory of owners: what an island sends grows with their number, or does not."""

from __future__ import annotations

import json

import pytest

from labs import owners


def test_traffic_of_owners_stays_flat(capsys: pytest.CaptureFixture[str]) -> None:
    owners.main(["--numel", "400000", "--islands", "2", "4", "12", "--rounds", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    bits = {(row["exchange"], row["islands"]): row["bits_per_parameter"] for row in found}
    assert bits["all_gather", 12] == pytest.approx(11 * bits["all_gather", 2])
    assert bits["owner_reduce", 12] < 2 * bits["owner_reduce", 4]
    assert bits["owner_reduce", 12] < bits["all_gather", 12] / 3
    assert all(row["codec_s"] > 0 for row in found)
    both = [row["exchange_s"] for row in found if row["islands"] == 12]
    assert both[0]["20"] > both[1]["20"]
