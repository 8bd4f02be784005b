"""The simulator of islands whose interval the law chooses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.config import INTERVALS
from labs.control import rounds, rounds_plant, traces
from labs.control.losses import make_losses
from labs.control.plant import BUDGET_S, CODEC_S, COMPUTE_S
from labs.control.rounds_plant import Plant, affordable, best, run, wire_bytes
from labs.control.traces import MBIT, Trace

STEPS = 3000


def quiet(rate: float, steps: int = STEPS) -> Trace:
    return Trace("quiet", (rate,) * steps, noise=0.0, outliers=0.0)


@pytest.mark.parametrize("hosts", [2, 8])
@pytest.mark.parametrize("rate", [4 * MBIT, 20 * MBIT, 100 * MBIT])
def test_oracle_takes_the_shortest_interval_at_which_three_percent_fit(
    rate: float, hosts: int
) -> None:
    interval, k = best(rate, hosts, 0.05, hides=False)
    assert interval in INTERVALS
    if interval > 4:
        assert affordable(rate, hosts, 0.05, interval // 2, 0) < 0.03 * CHUNK_NUMEL
    if interval < 32:
        assert k >= 0.03 * CHUNK_NUMEL
    hidden, _ = best(rate, hosts, 0.05, hides=True)
    assert hidden <= interval
    plant = Plant(quiet(rate), hosts, 0)
    spread_s = 0.03 * COMPUTE_S
    assert plant.step_s(100, 99 + interval, k, 0) <= BUDGET_S + spread_s or k == 1


def test_hidden_exchange_lengthens_a_step_by_what_is_left() -> None:
    plant = Plant(quiet(20 * MBIT), 2, 0)
    comm_s = plant.comm_s(107, 200)
    own_s = max(plant.computes_s(100, 107))
    waited = plant.step_s(100, 107, 200, 0)
    hidden = plant.step_s(100, 107, 200, 2)
    assert waited == pytest.approx((own_s + CODEC_S + comm_s) / 8)
    assert hidden == pytest.approx((own_s + CODEC_S + max(0.0, comm_s - own_s / 4)) / 8)
    # An index costs more the fewer there are.
    assert wire_bytes(4, 2) / 4 > 1.3 * wire_bytes(400, 2) / 400


@pytest.mark.parametrize("name", ["auto, hidden", "auto, waited for"])
def test_law_reaches_the_oracle_on_an_unchanged_link(name: str) -> None:
    for rate in (10 * MBIT, 60 * MBIT):
        plant = Plant(quiet(rate), 2, 0)
        passed, update_s = run(name, plant, make_losses("healthy", 0, STEPS))
        assert update_s > 0.0
        last = passed[-1]
        assert last.interval == last.oracle_interval
        assert 0.75 <= last.share / last.oracle_share <= 1.05
        assert last.step_s <= BUDGET_S
        steps = [b.step - a.step for a, b in itertools.pairwise(passed)]
        assert steps == [x.interval for x in passed[1:]]


def test_figures_tell_a_law_with_the_right_interval_from_one_with_a_wrong_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = {kind: traces.KINDS[kind] for kind in ("square", "stationary")}
    monkeypatch.setattr(traces, "KINDS", kinds)
    monkeypatch.setattr(rounds, "HOSTS", (8,))
    laws = rounds.run_all(["auto, hidden", "every 4, hidden"], 1, 3 * rounds.BEGIN_STEPS)
    auto, fixed = laws["auto, hidden"], laws["every 4, hidden"]
    assert abs(auto["interval_vs_oracle"] - 1.0) < abs(fixed["interval_vs_oracle"] - 1.0)
    assert auto["in_budget"] > 0.95
    assert auto["share_vs_oracle"] > fixed["share_vs_oracle"]
    assert set(auto["links"]) == set(kinds)


def test_script_prints_json_last_and_writes_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "KINDS", {"stationary": traces.KINDS["stationary"]})
    monkeypatch.setattr(rounds, "HOSTS", (2, 8))
    out = tmp_path / "interval.json"
    steps = str(3 * rounds.BEGIN_STEPS)
    flags = ["--seeds", "1", "--steps", steps, "--laws", "auto, hidden", "--no-plots"]
    assert rounds.main([*flags, "--out", str(out)]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(document["laws"]["auto, hidden"]) == {key for key, _, _ in rounds.COLUMNS}
    assert "| auto, hidden |" in out.with_suffix(".md").read_text()
    assert json.loads(out.read_text())["laws"]["auto, hidden"]["links"]["stationary"]


def test_wrong_flags_are_told_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert rounds.main(["--seeds", "0", "--steps", "10", "--laws", "magic"]) == 2
    told = capsys.readouterr().err
    assert "--laws must be of auto, hidden;" in told
    assert "--seeds must be at least 1, got 0." in told
    assert f"--steps must be at least {3 * rounds.BEGIN_STEPS}, got 10." in told
    assert set(rounds_plant.LAWS) >= set(rounds.DRAWN)
