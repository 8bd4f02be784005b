"""Islands inside DeepSpeed, two processes on gloo: warm-up, sharing, views, resume, refusals.

Longer than 300 lines: one start of two ranks serves all of its tests.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fork_ranks import run_forked
from tests.helpers.ranks import results_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "accumulation-and-clipping": {"gas": 2, "gradient_clipping": 0.5},
    "bf16": {"bf16": True},
}
ADAPTIVE = {
    "ramp_steps": 4,
    "step_time_budget_s": 0.3,
    "density": {"initial": 0.1, "min": 0.002, "max": 0.25},
    "throttle": {"schedule": [{"step": 0, "rate_mbit": 1}, {"step": 14, "rate_mbit": 0.2}]},
    "verify_every_steps": 2,
}
RESUMED: dict[str, dict[str, Any]] = {
    "fp32": {"block": ADAPTIVE},
    "bf16": {"block": ADAPTIVE, "bf16": True},
    "sync_every-4": {"block": ADAPTIVE | {"sync_every": 4}, "gas": 2},
    "auto": {"block": ADAPTIVE | {"sync_every": "auto", "slow_momentum": 1.0}},
    "slow-momentum": {"block": ADAPTIVE | {"slow_momentum": 1.0}},
    "warm-up-begins-unpruned": {
        "block": ADAPTIVE | {"warmup": "auto", "warmup_steps": 18, "sync_every": "auto"}
    },
    # The virtual clock is read by the exchange's thread too, so times differ from run to run.
    "overlap": {"block": {"overlap": "auto", "sync_every": 4, "residual": "reset"}},
    "overlap-ahead": {"block": {"overlap": "auto"}},
}
TINY_NUMEL = 512 * 64 + 2 * 64 * 256 + 256 + 64 + 2 * 64 + 64 * 100 + 100

Case = tuple[str, dict[str, Any]]


def two_island_cases(folder: Path) -> dict[str, Case]:
    """Everything that can share one pair of processes."""
    cases: dict[str, Case] = {
        "4-bit": ("islands", {"block": ADAPTIVE | {"value_bits": 4}, "steps": 24}),
        "every-4": ("islands", {"block": {"sync_every": 4}, "steps": 22}),
        "clipped": ("islands", {"block": ADAPTIVE | {"clip_to_median": 1.0}, "steps": 24}),
        "dense": (
            "islands",
            {"block": {"density": dict.fromkeys(("initial", "min", "max"), 1.0)}, "steps": 8},
        ),
        "view": ("weights_in_view", {}),
        "undisturbed": ("evaluations_change_nothing", {"evaluate": False}),
        "disturbed": ("evaluations_change_nothing", {"evaluate": True}),
        "odd": ("odd_model", {"folder": str(folder / "odd")}),
        "like-one-fp32": ("like_one_rank", {}),
        "like-one-bf16": ("like_one_rank", {"bf16": True}),
        "batches": ("batch_arithmetic", {}),
        "two-engines": ("two_engines", {}),
        "files": ("checkpoint_files", {"folder": str(folder / "files")}),
        "foreign": ("foreign_checkpoints", {"folder": str(folder / "foreign")}),
        "sick-fp32": ("sick_island", {"bf16": False}),
        "sick-bf16": ("sick_island", {"bf16": True}),
        "sick-warm": ("sick_island", {"bf16": False, "warmup_steps": 20}),
        "detached": ("detached", {}),
        "refusals": ("island_refusals", {}),
        "perturbed": ("perturbed", {}),
    }
    for name, options in KINDS.items():
        plain = {"block": None, "way": "plain", "steps": 10}
        cases[f"plain-{name}"] = ("train", plain | options)
        cases[f"warm-{name}"] = ("islands", {"block": {"warmup_steps": 11}, "steps": 10} | options)
        cases[f"equal-{name}"] = ("islands", {"block": ADAPTIVE, "steps": 24} | options)
    arguments = {"block": FIXED, "steps": 6}
    cases["way-initialize"] = ("train", arguments | {"way": "initialize", "virtual": False})
    cases["way-register"] = ("train", arguments | {"way": "register"})  # last: it stays registered
    return cases


FIXED = {
    "prune": "update",
    "warmup_steps": 2,
    "ramp_steps": 0,
    "density": {"initial": 0.05, "min": 0.05, "max": 0.05},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a case -> its results on both ranks."""
    cases = two_island_cases(tmp_path_factory.mktemp("two"))
    ranks = run_forked(2, "tests.helpers.ds_main", "run_all", {"cases": cases}, timeout_s=350)
    return lambda name: results_of(ranks, name)


@pytest.mark.parametrize("name", KINDS)
def test_warmup_gives_the_bits_of_the_plain_run(two: Any, name: str) -> None:
    for plain, ours in zip(two(f"plain-{name}"), two(f"warm-{name}"), strict=True):
        assert ours["crcs"] == plain["crcs"]
        assert ours["losses"] == plain["losses"]
        assert ours["shared"] == ours["crcs"]


@pytest.mark.parametrize("name", KINDS)
def test_shared_weights_are_equal_after_every_step_and_own_ones_differ(two: Any, name: str) -> None:
    one, other = two(f"equal-{name}")
    assert one["shared"] == other["shared"]
    assert len(set(one["shared"])) == 24
    assert [a == b for a, b in zip(one["crcs"], other["crcs"], strict=True)] == [True] * 2 + [
        False
    ] * 22
    densities = [report["density"] for report in one["reports"]]
    assert densities == [report["density"] for report in other["reports"]]
    assert densities[:2] == [1.0, 1.0]
    assert 0.002 <= min(densities) < 0.1
    assert one["bytes"] == 4 * TINY_NUMEL


def test_clipped_updates_leave_the_shared_weights_equal(two: Any) -> None:
    one, other = two("clipped")
    assert one["shared"] == other["shared"]
    assert one["shared"][:2] == two("equal-fp32")[0]["shared"][:2]  # nothing is clipped in warm-up
    assert one["shared"][-1] != two("equal-fp32")[0]["shared"][-1]


@pytest.mark.parametrize("name", ["equal-fp32", "4-bit"])
def test_islands_learn(two: Any, name: str) -> None:
    one, other = two(name)
    assert one["shared"] == other["shared"]
    first = sum(map(sum, one["losses"][:3] + other["losses"][:3])) / 6
    last = sum(map(sum, one["losses"][-3:] + other["losses"][-3:])) / 6
    assert last < first - 0.8  # uniform guessing is ln 512 = 6.2


def test_every_fourth_step_is_exchanged(two: Any) -> None:
    one, other = two("every-4")
    assert one["shared"] == other["shared"]
    # The hash in the warm-up is that of the model; from then on that of the shared weights.
    assert len(set(one["shared"][2:5])) == 1
    assert [len(set(one["shared"][start : start + 4])) for start in (5, 9, 13, 17)] == [1] * 4
    assert len(set(one["shared"][5::4])) == 5
    steps = sorted({report["step"] for report in one["reports"]})
    assert steps == [1, 2, 6, 10, 14, 18, 22]
    report = one["reports"][9]  # after step 10
    losses = [loss for rank in (one, other) for step in rank["losses"][6:10] for loss in step]
    assert report["loss"] == pytest.approx(sum(losses) / 8, rel=1e-6)


def test_a_dense_exchange_leaves_nothing_unsent(two: Any) -> None:
    one, other = two("dense")
    assert one["crcs"] == other["crcs"]


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_islands_with_equal_data_train_like_one_rank(two: Any, kind: str) -> None:
    """Clipping, accumulation, weight decay, schedule, a layer without gradient: all DeepSpeed's.

    Exchanging rounds each of 8 steps to half an ulp of a weight below 4, 2^-22, which is 1.2e-4 of
    the learning rate 2e-3; in bf16 a weight may round to its other neighbour, 2^-8 of up to 0.4 or
    2^-9 of the norms' 1.
    """
    limit = 8 * 1.2e-4 if kind == "fp32" else 2.0**-8 / 2e-3
    assert max(two(f"like-one-{kind}")) <= limit


def test_both_ways_in_train_alike(two: Any) -> None:
    one, other = two("way-initialize")
    assert [trace["crcs"] for trace in two("way-register")] == [one["crcs"], other["crcs"]]
    assert one["crcs"] != other["crcs"]


def test_batch_sizes_are_those_of_the_whole_job(two: Any) -> None:
    one, other = two("batches")
    sizes = [{key: value for key, value in case.items() if key != "rows"} for case in one]
    assert sizes == [
        {"train": 32, "micro": 4, "gas": 4, "samples": 96},
        {"train": 32, "micro": 8, "gas": 2, "samples": 96},
        {"train": 24, "micro": 4, "gas": 3, "samples": 72},
    ]
    for case, case_other in zip(one, other, strict=True):
        assert sorted(case["rows"] + case_other["rows"]) == list(range(64))


def test_training_sees_the_own_weights_and_evaluation_the_shared_ones(two: Any) -> None:
    one, other = two("view")
    for answers in (one, other):
        for name in ("backward", "step", "load"):
            assert "shared_weights() must be left before training goes on" in answers.pop(name)
    assert one["loss"] == other.pop("loss") == one.pop("loss")
    assert one == other == dict.fromkeys(one, True)


def test_evaluating_and_saving_changes_no_training(two: Any) -> None:
    assert two("disturbed") == two("undisturbed")


def test_a_model_with_everything_uncommon(two: Any) -> None:
    one, other = two("odd")
    assert one.pop("seen") == one.pop("seen_again") == 9
    assert other.pop("seen") == other.pop("seen_again") == 18
    assert one == other
    for name in ("frozen", "groups", "bytes", "resumed"):
        assert one[name] is True, name


def test_two_engines_of_one_process_do_not_disturb_each_other(two: Any) -> None:
    assert two("two-engines") == [[True, True]] * 2


@pytest.mark.parametrize("kind", RESUMED)
def test_resume_at_any_step_equals_the_unbroken_run(tmp_path: Any, kind: str) -> None:
    arguments = RESUMED[kind] | {"folder": str(tmp_path), "steps": 22}
    places = [1, 7, 13]  # in the warm-up, in the ramp, in the middle of an interval
    if kind == "overlap-ahead":  # an exchange is under way at every step, and a save lands it
        places = [7]
    cases: dict[str, Case] = {"whole": ("save_islands_at", arguments | {"at": places})}
    for at in places:
        cases[str(at)] = ("resume_islands_at", arguments | {"at": at})
    ranks = run_forked(2, "tests.helpers.ds_main", "run_all", {"cases": cases}, timeout_s=300)
    unbroken = results_of(ranks, "whole")
    for at in places:
        for rank, resumed in enumerate(results_of(ranks, str(at))):
            for what in ("crcs", "shared", "losses", "draws"):
                assert resumed[what] == unbroken[rank][what][at:], what
            last = 0 if kind.startswith("overlap") else len(resumed["reports"])
            assert not last or resumed["reports"] == unbroken[rank]["reports"][-last:]
            assert resumed["lr"] == unbroken[rank]["lr"][-1:]
            assert resumed["samples"] == unbroken[rank]["samples"]
    if kind == "warm-up-begins-unpruned":
        _check_form(*unbroken)


def _check_form(one: Any, other: Any) -> None:
    """The link was tried and is slow: nothing is sent dense, and rounds are long."""
    reports = [
        report for report, after in itertools.pairwise([*one["reports"], None]) if report != after
    ]
    assert [report["step"] for report in reports] == [8, 16]
    assert all(report["decision"]["unpruned"] for report in reports)
    own = zip(one["crcs"], other["crcs"], strict=True)
    equal = [step for step, (first, second) in enumerate(own, 1) if first == second]
    assert equal == [1, 2, 8, 16]  # two steps have rate 0, and an exchange resets own weights
    sent = [report["wire_bytes"] / report["dense_bytes"] for report in reports]
    assert all(0.06 < share < 0.1 for share in sent)  # 2.25 of 32 bits


def test_a_checkpoint_holds_the_shared_weights_once(two: Any) -> None:
    one, other = two("files")
    assert one == other
    assert one["is_shared"]
    assert one["inside"]
    assert not one["is_own"]
    assert one["files"] == [
        "gradient_pruning_island_00000_shard_00000.pt",
        "gradient_pruning_island_00001_shard_00000.pt",
        "mp_rank_00_model_states.pt",
    ]


def test_checkpoints_of_other_runs(two: Any) -> None:
    one, other = two("foreign")
    assert one == other
    assert "prune must be 'update', got 'gradient'" in one["message"]
    assert one["untouched"]
    assert one["plain_loaded"]
    assert one["steps"] == 0


def test_nan_in_fp32_stops_all_islands_with_the_shared_weights_intact(two: Any) -> None:
    one, other = two("sick-fp32")
    assert one == other
    assert "the weights of island 1 hold inf or nan after step 5" in one["message"]
    assert one["shared_same"]


def test_nan_in_the_dense_warmup_stops_all_before_the_step(two: Any) -> None:
    """It was found at the first exchange after the warm-up, up to 200 steps later."""
    one, other = two("sick-warm")
    assert one == other
    assert "the gradients of island 1 hold inf or nan in step 5. No rank" in one["message"]
    assert one["shared_same"]


def test_nan_in_bf16_costs_one_island_one_step(two: Any) -> None:
    """DeepSpeed's bf16 optimizer skips a step whose gradient is not finite."""
    one, other = two("sick-bf16")
    assert (one.pop("skipped"), other.pop("skipped")) == (0, 1)
    assert one["message"] == "accepted"
    assert one["nonfinite"]
    assert not one["shared_same"]
    assert one == other
    assert one["later"] < 10


def test_perturbed_shared_weights_stop_the_run(two: Any) -> None:
    answers = two("perturbed")
    assert all("no longer agree on their decisions or parameters" in text for text in answers)


def test_detach_leaves_the_shared_weights_and_no_hook(two: Any) -> None:
    one, other = two("detached")
    assert one == other
    assert one["left"] == []
    assert one["hooks"]


def test_what_islands_do_not_support_is_refused_by_name(two: Any) -> None:
    one, other = two("refusals")
    assert one == other
    assert "Make it with ds_gradprune.initialize, or call ds_gradprune.register()" in one["attach"]
    assert 'prune = "update", the default, needs' in one["attach"]
    assert "keeps DeepSpeed inside islands and does not support an mpu." in one["mpu"]
    assert "does not support sequence_parallel_size." in one["sequence"]
    assert "needs float32 weights in the optimizer, got torch.bfloat16 for" in one["bf16 weights"]


def test_one_island_trains_as_deepspeed_does() -> None:
    cases: dict[str, Case] = {
        "idle": ("train", {"block": FIXED, "way": "initialize", "virtual": False, "steps": 5}),
        "plain": ("train", {"block": None, "way": "plain", "steps": 5}),
        "alone": ("alone", {}),
    }
    (rank,) = run_forked(1, "tests.helpers.ds_main", "run_all", {"cases": cases})
    idle, plain, alone = (results_of([rank], name)[0] for name in cases)
    assert alone == {"idle": True, "same": True, "report": None}
    assert idle["crcs"] == plain["crcs"]
    assert idle["reports"] == []
