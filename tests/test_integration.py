"""Inside DeepSpeed, two processes on gloo: transparency, equality, hooks, resume, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.ranks import run_processes

pytestmark = pytest.mark.distributed

DENSE = {"warmup_steps": 0, "ramp_steps": 0, "density": {"initial": 1.0, "min": 1.0, "max": 1.0}}
FIXED = {"warmup_steps": 2, "ramp_steps": 0, "density": {"initial": 0.05, "min": 0.05, "max": 0.05}}
ADAPTIVE = {
    "warmup_steps": 2,
    "ramp_steps": 2,
    "window_size": 4,
    "step_time_budget_s": 0.3,
    "density": {"initial": 0.1, "min": 0.002, "max": 0.25},
    "throttle": {"schedule": [{"step": 0, "rate_mbit": 1}, {"step": 14, "rate_mbit": 0.2}]},
    "verify_every_steps": 2,
}


def train(**arguments: Any) -> list[dict[str, Any]]:
    return run_processes(2, "tests.helpers.ds_main", "train", arguments)


def test_disabled_is_byte_for_byte_deepspeed() -> None:
    plain = train(block=None, way="plain", steps=20)
    disabled = train(block={"enabled": False}, steps=20)
    assert plain[0]["crcs"] == disabled[0]["crcs"] == disabled[1]["crcs"]
    assert disabled[0]["reports"] == []


@pytest.mark.parametrize(
    "options",
    [{}, {"gas": 3, "gradient_clipping": 0.5}, {"bf16": True}],
    ids=["fp32", "accumulation-and-clipping", "bf16"],
)
def test_density_one_gives_the_bits_of_the_plain_run(options: dict[str, Any]) -> None:
    plain = train(block=None, way="plain", steps=20, **options)
    ours = train(block=DENSE, way="attach", steps=20, **options)
    for rank in range(2):
        assert ours[rank]["crcs"] == plain[rank]["crcs"]
        assert ours[rank]["losses"] == plain[rank]["losses"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gas": 2, "gradient_clipping": 0.5},
        {"bf16": True},
        {"communication_data_type": "bf16"},
        {"prescale_gradients": True, "gradient_predivide_factor": 1.0},
        {"gradient_predivide_factor": 2.0},
    ],
    ids=["fp32", "accumulation-and-clipping", "bf16", "bf16-wire", "prescale", "predivide"],
)
def test_parameters_are_equal_on_all_ranks_after_every_step(options: dict[str, Any]) -> None:
    one, other = train(block=ADAPTIVE, way="attach", steps=24, **options)
    assert one["crcs"] == other["crcs"]
    assert len(set(one["crcs"])) == 24
    densities = [report["density"] for report in one["reports"]]
    assert densities == [report["density"] for report in other["reports"]]
    assert densities[:2] == [1.0, 1.0]
    assert 0.002 <= min(densities) < 0.1


def test_it_learns_and_the_signals_are_true() -> None:
    one, other = train(block=FIXED, steps=40)
    first = sum(map(sum, one["losses"][:3] + other["losses"][:3])) / 6
    last = sum(map(sum, one["losses"][-3:] + other["losses"][-3:])) / 6
    assert last < first - 1.0  # uniform guessing is ln 512 = 6.2
    for step, report in enumerate(one["reports"], start=1):
        mean = (one["losses"][step - 1][0] + other["losses"][step - 1][0]) / 2
        assert report["step"] == step
        assert report["loss"] == pytest.approx(mean, rel=1e-6)  # float32 in the header
        assert report["density"] == pytest.approx(1.0 if step <= 2 else 205 / 4096)
    pruned = one["reports"][-1]
    assert pruned["wire_bytes"] < pruned["dense_bytes"] / 8
    parameters = 512 * 64 + 2 * 64 * 256 + 256 + 64 + 2 * 64 + 64 * 100 + 100
    assert one["residual_bytes"] == 4 * parameters
    assert pruned["dense_bytes"] == 4 * parameters  # two ranks: a ring sends everything once


def test_accumulated_losses_are_averaged_over_micro_steps() -> None:
    one, other = train(block=FIXED, steps=3, gas=4)
    for step in range(3):
        mean = (sum(one["losses"][step]) + sum(other["losses"][step])) / 8
        assert one["reports"][step]["loss"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("way", ["register", "attach"])
def test_every_way_in_trains_alike(way: str) -> None:
    ours = train(block=FIXED, steps=6, way=way, virtual=False)
    reference = train(block=FIXED, steps=6, way="initialize", virtual=False)
    assert ours[0]["crcs"] == reference[0]["crcs"]


def test_resume_at_any_step_equals_the_unbroken_run(tmp_path: Any) -> None:
    log = str(tmp_path / "log.jsonl")
    arguments = {"block": ADAPTIVE | {"log_path": log}, "folder": str(tmp_path), "last": 22}
    unbroken = run_processes(2, "tests.helpers.ds_cases", "save_at", arguments | {"at": [5, 13]})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 23))
    for start in (5, 13):
        resumed = run_processes(2, "tests.helpers.ds_cases", "resume_at", arguments | {"at": start})
        for rank in range(2):
            assert resumed[rank]["crcs"] == unbroken[rank]["crcs"][start:]
            assert resumed[rank]["losses"] == unbroken[rank]["losses"][start:]
            assert resumed[rank]["reports"] == unbroken[rank]["reports"][start:]
            assert resumed[rank]["random"] == unbroken[rank]["random"][start:]
        again = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert again == lines  # the lines after the checkpoint were dropped and written anew


def test_a_checkpoint_without_a_ranks_file_changes_nothing(tmp_path: Any) -> None:
    answers = run_processes(
        2, "tests.helpers.ds_cases", "broken_checkpoints", {"folder": str(tmp_path)}
    )
    assert answers[0] == answers[1]
    missing, damaged, foreign, untouched = answers[0]
    assert "rank 1: gradient_pruning_rank_00001_of_00002.pt is missing" in missing
    assert "gradient_pruning_rank_00001_of_00002.pt is damaged" in damaged
    assert "rank 0: gradient_pruning_rank_00000_of_00002.pt is missing" in foreign
    assert untouched


def test_a_checkpoint_of_a_plain_run_starts_pruning_afresh(tmp_path: Any) -> None:
    answers = run_processes(
        2, "tests.helpers.ds_cases", "plain_checkpoint", {"folder": str(tmp_path)}
    )
    assert answers[0]["crc_loaded"] == answers[0]["crc_saved"]
    assert answers[0]["step"] == 0
    assert "holds no pruning state" in answers[0]["warning"]


def test_detach_gives_everything_back() -> None:
    answers = run_processes(2, "tests.helpers.ds_cases", "detach_leaves_nothing", {})
    assert answers == [[], []]


def test_other_collectives_pass_and_are_logged() -> None:
    answers = run_processes(2, "tests.helpers.ds_cases", "other_collectives", {})
    assert answers[0] == answers[1] == {"sum": 3.0, "max": 2.0, "gathered": [1.0, 2.0], "op": True}


def test_nan_on_one_rank_is_seen_by_all_and_spoils_no_residual() -> None:
    one, other = run_processes(2, "tests.helpers.ds_cases", "nan_gradient", {})
    assert one == other == {"nonfinite": True, "residual_same": True, "parameters_nan": True}


def test_perturbed_parameters_stop_the_run() -> None:
    answers = run_processes(2, "tests.helpers.ds_cases", "perturbed_parameters", {})
    assert all("no longer agree on their decisions or parameters" in text for text in answers)


def test_hosts_that_differ_are_named() -> None:
    answers = run_processes(2, "tests.helpers.ds_cases", "different_blocks", {})
    assert answers[0] == answers[1]
    assert "all hosts must run the same versions and configuration" in answers[0]
    assert '"warmup_steps":1' in answers[0]
    assert '"warmup_steps":2' in answers[0]


def test_what_cannot_be_pruned_is_refused_by_name() -> None:
    answers = run_processes(1, "tests.helpers.ds_cases", "refusals", {})[0]
    assert "does not support zero_optimization.stage 1 yet (only stage 0)" in answers["stage"]
    assert "nn.Embedding(sparse=True)" in answers["sparse"]
    assert "attached already" in answers["twice"]
    assert "gradient_pruning must be present" in answers["missing"]
    assert 'did you mean "gradient_pruning"' in answers["misspelt"]
    assert "lacks DeepSpeedEngine.allreduce_bucket" in answers["version"]
    assert "tested with 0.19.8" in answers["version"]


def test_one_rank_trains_and_pruning_is_idle() -> None:
    ours = run_processes(1, "tests.helpers.ds_main", "train", {"block": FIXED, "steps": 5})
    plain = run_processes(
        1, "tests.helpers.ds_main", "train", {"block": None, "way": "plain", "steps": 5}
    )
    assert ours[0]["crcs"] == plain[0]["crcs"]
    assert ours[0]["reports"] == []


def test_monitor_gets_its_numbers(tmp_path: Any) -> None:
    names = run_processes(2, "tests.helpers.ds_cases", "csv_monitor", {"folder": str(tmp_path)})[0]
    assert {"gradient_pruning_density", "gradient_pruning_wire_bytes"} <= set(names)
