"""`follow(trainer)`: what the logs, the disks and the saved model show, at ZeRO stage 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.trainer.conftest import result

pytestmark = [pytest.mark.trainer, pytest.mark.distributed, pytest.mark.timeout(300)]

Runs = dict[str, list[Any]]
NUMBERS = {
    "density",
    "target",
    "mb",
    "interval",
    "compression",
    "compute_s",
    "codec_s",
    "exposed_s",
    "hidden_s",
    "residual_norm",
    "cause",
}
LATER = {"performance", "link_mbit"}
"""Known once the window is full, and once a pruned step was timed."""


def ours(entry: dict[str, Any]) -> dict[str, Any]:
    return {k.split("/")[1]: v for k, v in entry.items() if k.startswith("gradprune/")}


def test_history_holds_our_numbers(runs: Runs) -> None:
    one, other = result(runs, "disks")
    entries = [ours(entry) for entry in one["logs"]]
    assert len(entries) == 8
    assert all(NUMBERS <= set(entry) for entry in entries)
    assert NUMBERS | LATER == set(entries[-1])
    assert [entry["density"] for entry in entries] == [1.0] * 2 + [205 / 4096] * 6
    # Dense steps owe nothing; what a pruned one leaves is owed.
    assert [entry["residual_norm"] > 0 for entry in entries] == [False] * 2 + [True] * 6
    assert entries[0]["compression"] == pytest.approx(1.0, rel=0.01)
    assert entries[-1]["compression"] > 30
    assert entries[-1]["mb"] * entries[-1]["compression"] == pytest.approx(
        entries[0]["mb"], rel=0.01
    )
    # Rank 0 alone logs: the numbers of other ranks are their own.
    assert not any(ours(entry) for entry in other["logs"])


def test_numbers_are_means_since_the_line_before(runs: Runs) -> None:
    one, _ = result(runs, "gradient")
    entries = [ours(entry) for entry in one["logs"]]
    assert [entry["step"] for entry in one["logs"]] == [2, 4, 6, 8]
    assert [entry["density"] for entry in entries] == [1.0] + [205 / 4096] * 3
    assert entries[1]["mb"] == pytest.approx(entries[2]["mb"])
    assert one["eval_logs"]
    assert not any(ours(entry) for entry in one["eval_logs"])


def test_integrations_of_report_to_hear_them(runs: Runs) -> None:
    one, _ = result(runs, "integration")
    assert one["names"][0] == "GradPruneCallback"
    assert one["names"].count("GradPruneCallback") == 1
    assert one["is_one"]
    assert all(NUMBERS <= set(ours(heard)) for heard in one["heard"] if "loss" in heard)
    assert not any(ours(heard) for heard in one["heard"] if "loss" not in heard)


def test_callback_alone_serves_those_behind_it(runs: Runs) -> None:
    one, _ = result(runs, "alone")
    assert [ours(entry) for entry in one["logs"]] == [
        ours(heard) for heard in one["heard"] if "loss" in heard
    ]
    assert NUMBERS | LATER == set(ours(one["logs"][-1]))


@pytest.mark.parametrize("name", ["disks", "registered", "each_node"])
def test_every_host_keeps_as_many_checkpoints_as_the_limit_says(name: str, runs: Runs) -> None:
    for rank in result(runs, name):
        assert rank["checkpoints"] == ["checkpoint-8"]


def test_every_host_resumes_from_a_disk_of_its_own(runs: Runs) -> None:
    """DeepSpeed's files lay on the first host alone, whatever `save_on_each_node` said."""
    for before, after in zip(result(runs, "nodes"), result(runs, "nodes again"), strict=True):
        assert after["seen"] == before["seen"][4:]
        for name, value in before["final"].items():
            assert torch.equal(value, after["final"][name])
        kept = {name for name in before["files"] if name.startswith("checkpoint-4/")}
        assert {"checkpoint-4/latest", "checkpoint-4/trainer_state.json"} <= kept


def test_nothing_is_deleted_without_a_limit(runs: Runs) -> None:
    for rank in result(runs, "no_limit"):
        assert rank["checkpoints"] == ["checkpoint-4", "checkpoint-8"]


@pytest.mark.parametrize("name", ["best", "gradient"])
def test_best_model_is_loaded_on_all_ranks(name: str, runs: Runs) -> None:
    one, other = result(runs, name)
    # A limit of 1 keeps the best one alone, once the training has ended.
    kept = ["checkpoint-4"] if name == "gradient" else ["checkpoint-4", "checkpoint-8"]
    for rank in (one, other):
        assert rank["best"].endswith("checkpoint-4")
        assert rank["checkpoints"] == kept
        assert rank["saved_best"].keys() <= rank["final"].keys()
        for weight, value in rank["saved_best"].items():
            assert torch.equal(value, rank["final"][weight])


def test_evaluation_and_saved_model_have_the_shared_weights(runs: Runs) -> None:
    one, other = result(runs, "by_hand")
    own = [[row[4] for row in rank["seen"]] for rank in (one, other)]
    assert [a == b for a, b in zip(*own, strict=True)] == [True] * 2 + [False] * 3
    for name, value in one["saved"].items():
        assert torch.equal(value, one["final"][name])
        assert torch.equal(value, other["final"][name])
    assert one["eval_loss"] == other["eval_loss"] == pytest.approx(one["loss"], abs=1e-5)


@pytest.mark.parametrize("mean", [True, False])
def test_last_step_of_an_epoch_may_be_short(mean: bool, runs: Runs) -> None:
    one, other = result(runs, f"short_{mean}")
    assert [row[:4] for row in one["seen"]] == [row[:4] for row in other["seen"]]
    # Three batches an epoch, two a step: every other step has one. The Trainer's log is the mean.
    losses = [row[2] for row in one["seen"]]
    assert one["logged"] == [pytest.approx(loss, abs=1e-3) for loss in losses]
    assert one["steps"] == 6


def test_accelerate_loop_with_short_steps(runs: Runs) -> None:
    one, other = result(runs, "accelerate")
    means = [(a + b) / 2 for a, b in zip(one["losses"], other["losses"], strict=True)]
    assert one["reported"] == other["reported"] == [pytest.approx(mean, abs=1e-5) for mean in means]
    for name, value in one["final"].items():
        assert torch.equal(value, other["final"][name])


def test_accelerate_that_counts_one_process_is_refused(runs: Runs) -> None:
    """All ranks read the same data, silently, until `gather` failed in the first evaluation."""
    said = set(runs["miscounted"])
    assert len(said) == 1
    assert said.pop().startswith("refused: accelerate counts 1 processes where 2 ranks train")


@pytest.mark.parametrize("stage", [0, 3])
def test_preference_optimisation_with_a_reference_model(stage: int, runs: Runs) -> None:
    one, other = result(runs, f"preference_{stage}")
    assert one["losses"][-1] < one["losses"][0]
    assert one["density"] == 205 / 4096
    assert one["shared"] == other["shared"]
    assert one["reference_is_untouched"]
    assert other["reference_is_untouched"]


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("no deepspeed", "UnsupportedError: follow(trainer) needs a Trainer that trains with Deep"),
        ("no block", "ConfigError: gradient_pruning must be present in the DeepSpeed configurat"),
        ("wrong block", 'warmup_stepz is not a known key. Did you mean "warmup_steps"?'),
        ("engine made before", "engine was made without gradient pruning. Call ds_gradprune.tra"),
        ("reference made before", "trainer.ref_model is an engine at ZeRO stage 3 whose weights a"),
        ("miscounted", "counts 1 processes where the launcher started 2"),
        ("miscounted alone", "or pass use_cpu=True to TrainingArguments"),
        ("uneven", "RankMismatchError: all ranks must run the same thing, but TrainingArguments.s"),
        ("uneven", "training examples is 64 on rank 0 of "),
    ],
)
def test_mistakes_are_told_before_any_work(mistake: str, words: str, runs: Runs) -> None:
    for rank in result(runs, "mistakes"):
        assert words in rank[mistake]
