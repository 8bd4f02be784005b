"""Inside DeepSpeed, two processes on gloo: transparency, equality, hooks, resume, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fork_ranks import run_forked
from tests.helpers.ranks import results_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

DENSE = {
    "prune": "gradient",
    "warmup_steps": 0,
    "ramp_steps": 0,
    "density": {"initial": 1.0, "min": 1.0, "max": 1.0},
}
FIXED = DENSE | {"warmup_steps": 2, "density": {"initial": 0.05, "min": 0.05, "max": 0.05}}
ADAPTIVE = {
    "prune": "gradient",
    "warmup_steps": 2,
    "ramp_steps": 2,
    "window_size": 4,
    "step_time_budget_s": 0.3,
    "density": {"initial": 0.1, "min": 0.002, "max": 0.25},
    "throttle": {"schedule": [{"step": 0, "rate_mbit": 1}, {"step": 14, "rate_mbit": 0.2}]},
    "verify_every_steps": 2,
}

TRANSPARENT: dict[str, dict[str, Any]] = {
    "fp32": {},
    "accumulation-and-clipping": {"gas": 3, "gradient_clipping": 0.5},
    "bf16": {"bf16": True},
}
EQUAL: dict[str, dict[str, Any]] = {
    "fp32": {},
    "accumulation-and-clipping": {"gas": 2, "gradient_clipping": 0.5},
    "bf16": {"bf16": True},
    "bf16-wire": {"communication_data_type": "bf16"},
    "prescale": {"prescale_gradients": True},
    "predivide": {"gradient_predivide_factor": 2.0},
}

Case = tuple[str, dict[str, Any]]


def two_rank_cases(folder: Path) -> dict[str, Case]:
    """Everything that can share one pair of processes."""
    cases: dict[str, Case] = {
        "disabled": ("train", {"block": {"enabled": False}, "steps": 20}),
        "learns": ("train", {"block": FIXED, "steps": 40}),
        "clipped": ("train", {"block": FIXED | {"clip_to_median": 0.5}, "steps": 6}),
        "accumulated": ("train", {"block": FIXED, "steps": 3, "gas": 4}),
        "monitor": ("csv_monitor", {"folder": str(folder / "csv")}),
        "detach": ("detach_leaves_nothing", {}),
        "nan": ("nan_gradient", {}),
        "plain-checkpoint": ("plain_checkpoint", {"folder": str(folder / "plain")}),
        "broken": ("broken_checkpoints", {"folder": str(folder / "broken")}),
        "perturbed": ("perturbed_parameters", {}),
        "hosts": ("different_blocks", {}),
        "collectives": ("other_collectives", {}),
    }
    for name, options in TRANSPARENT.items():
        plain = {"block": None, "way": "plain", "steps": 20} | options
        cases[f"plain-{name}"] = ("train", plain)
        cases[f"dense-{name}"] = ("train", {"block": DENSE, "way": "attach", "steps": 20} | options)
    for name, options in EQUAL.items():
        arguments = {"block": ADAPTIVE, "way": "attach", "steps": 24} | options
        cases[f"equal-{name}"] = ("train", arguments)
    for way in ("initialize", "attach", "register"):
        arguments = {"block": FIXED, "steps": 6, "way": way, "virtual": False}
        cases[f"way-{way}"] = ("train", arguments)
    return cases


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a case -> its results on both ranks."""
    cases = two_rank_cases(tmp_path_factory.mktemp("two"))
    ranks = run_forked(2, "tests.helpers.ds_main", "run_all", {"cases": cases}, timeout_s=350)
    return lambda name: results_of(ranks, name)


@pytest.fixture(scope="module")
def one() -> Any:
    """Name of a case -> its result on a single rank."""
    cases: dict[str, Case] = {
        "idle": ("train", {"block": FIXED, "steps": 5}),
        "plain": ("train", {"block": None, "way": "plain", "steps": 5}),
        "refusals": ("refusals", {}),
    }
    ranks = run_forked(1, "tests.helpers.ds_main", "run_all", {"cases": cases}, timeout_s=100)
    return lambda name: results_of(ranks, name)[0]


def test_disabled_is_byte_for_byte_deepspeed(two: Any) -> None:
    plain, disabled = two("plain-fp32"), two("disabled")
    assert plain[0]["crcs"] == disabled[0]["crcs"] == disabled[1]["crcs"]
    assert disabled[0]["reports"] == []


@pytest.mark.parametrize("name", TRANSPARENT)
def test_density_one_gives_the_bits_of_the_plain_run(two: Any, name: str) -> None:
    for plain, ours in zip(two(f"plain-{name}"), two(f"dense-{name}"), strict=True):
        assert ours["crcs"] == plain["crcs"]
        assert ours["losses"] == plain["losses"]


@pytest.mark.parametrize("name", EQUAL)
def test_parameters_are_equal_on_all_ranks_after_every_step(two: Any, name: str) -> None:
    one, other = two(f"equal-{name}")
    assert one["crcs"] == other["crcs"]
    assert len(set(one["crcs"])) == 24
    densities = [report["density"] for report in one["reports"]]
    assert densities == [report["density"] for report in other["reports"]]
    assert densities[:2] == [1.0, 1.0]
    assert 0.002 <= min(densities) < 0.1


def test_it_learns_and_the_signals_are_true(two: Any) -> None:
    one, other = two("learns")
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


def test_accumulated_losses_are_averaged_over_micro_steps(two: Any) -> None:
    one, other = two("accumulated")
    for step in range(3):
        mean = (sum(one["losses"][step]) + sum(other["losses"][step])) / 8
        assert one["reports"][step]["loss"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("way", ["register", "attach"])
def test_every_way_in_trains_alike(two: Any, way: str) -> None:
    assert two(f"way-{way}")[0]["crcs"] == two("way-initialize")[0]["crcs"]


def test_resume_at_any_step_equals_the_unbroken_run(tmp_path: Any) -> None:
    log = str(tmp_path / "log.jsonl")
    block = ADAPTIVE | {"log_path": log}
    arguments = {"block": block, "folder": str(tmp_path), "last": 22}
    unbroken = run_forked(2, "tests.helpers.ds_cases", "save_at", arguments | {"at": [5, 13]})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 23))
    cases = {str(at): ("resume_at", arguments | {"at": at}) for at in (13, 5)}
    ranks = run_forked(2, "tests.helpers.ds_main", "run_all", {"cases": cases})
    for start in (5, 13):
        resumed = results_of(ranks, str(start))
        for rank in range(2):
            for what in ("crcs", "losses", "reports", "random"):
                assert resumed[rank][what] == unbroken[rank][what][start:], what
    # The lines after the checkpoint were dropped and written anew.
    again = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert again == lines


def test_a_checkpoint_without_a_ranks_file_changes_nothing(two: Any) -> None:
    answers = two("broken")
    assert answers[0] == answers[1]
    missing, damaged, foreign, untouched = answers[0]
    assert "rank 1 on " in missing
    assert "gradient_pruning_island_00001_shard_00000.pt is missing" in missing
    assert "gradient_pruning_island_00001_shard_00000.pt is damaged" in damaged
    assert "was saved by ds_gradprune 0.1" in foreign
    assert untouched


def test_a_checkpoint_of_a_plain_run_starts_pruning_afresh(two: Any) -> None:
    answers = two("plain-checkpoint")
    assert answers[0]["crc_loaded"] == answers[0]["crc_saved"]
    assert answers[0]["step"] == 0
    assert "holds no pruning state" in answers[0]["warning"]


def test_detach_gives_everything_back(two: Any) -> None:
    answers = two("detach")
    assert answers == [[], []]


def test_other_collectives_pass_and_are_logged(two: Any) -> None:
    answers = two("collectives")
    assert answers[0] == answers[1] == {"sum": 3.0, "max": 2.0, "gathered": [1.0, 2.0], "op": True}


def test_clipped_gradients_leave_all_ranks_equal(two: Any) -> None:
    one, other = two("clipped")
    assert one["crcs"] == other["crcs"]
    assert one["crcs"] != two("way-attach")[0]["crcs"]


def test_nan_on_one_rank_stops_all_before_the_step(two: Any) -> None:
    """All ranks got nan, went on, and saved nan over their last good checkpoint."""
    one, other = two("nan")
    assert one == other
    for found, step in zip(one, (1, 4), strict=True):
        told = f"the gradients of rank 1 hold inf or nan in step {step}. No rank has stepped"
        assert told in found["message"]
        assert found["residual_same"]
        assert found["weights_same"]
    assert one[0]["density"] == 1.0 > one[1]["density"]


def test_perturbed_parameters_stop_the_run(two: Any) -> None:
    answers = two("perturbed")
    assert all("no longer agree on their decisions or parameters" in text for text in answers)


def test_hosts_that_differ_are_named(two: Any) -> None:
    answers = two("hosts")
    assert answers[0] == answers[1]
    assert "all ranks must run the same thing" in answers[0]
    assert "gradient_pruning.warmup_steps is 1 on rank 0" in answers[0]
    assert "and 2 on rank 1" in answers[0]


def test_what_cannot_be_pruned_is_refused_by_name(one: Any) -> None:
    answers = one("refusals")
    assert 'zero_optimization.stage 3 with prune = "gradient"' in answers["stage"]
    assert "nn.Embedding(sparse=True)" in answers["sparse"]
    assert "attached already" in answers["twice"]
    assert "gradient_pruning must be present" in answers["missing"]
    assert 'did you mean "gradient_pruning"' in answers["misspelt"]
    assert "lacks DeepSpeedEngine.allreduce_bucket" in answers["version"]
    assert "tested with: 0.19.8" in answers["version"]


def test_one_rank_trains_and_pruning_is_idle(one: Any) -> None:
    assert one("idle")["crcs"] == one("plain")["crcs"]
    assert one("idle")["reports"] == []


def test_monitor_gets_its_numbers(two: Any) -> None:
    names = two("monitor")[0]
    wanted = {"density", "wire_mb", "residual_norm", "target", "cause", "hidden_time_s"}
    assert {f"gradient_pruning_{name}" for name in wanted} <= set(names)
