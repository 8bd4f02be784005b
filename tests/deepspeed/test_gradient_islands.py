"""Pruned gradients of islands of two ranks: dense inside, each element once between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fork_ranks import run_forked
from tests.helpers.gradient_islands import DENSE_KINDS
from tests.helpers.ranks import results_of
from tests.helpers.zero_answers import rounding_limit

pytestmark = [
    pytest.mark.zero,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(400),
]

PRUNED = ("0-fp32", "0-bf16", "1-overlap", "1-bf16-sums", "2-whole", "2-overlap", "2-single")
EXACT = ("1-overlap", "1-bf16-sums", "2-whole", "2-overlap", "2-single")
RESUMED = ("0-fp32", "2-fp32")
CROSSING = ("0-fp32", "2-fp32")


def cases(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Everything that shares the four processes."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in DENSE_KINDS:
        found[f"dense-{name}"] = ("dense", {"kind": name})
    for name in PRUNED:
        found[f"pruned-{name}"] = ("pruned", {"name": name})
    for name in CROSSING:
        found[f"crosses-{name}"] = ("crosses", {"kind": name})
    for name in RESUMED:
        arguments = {"folder": str(folder), "name": name, "at": 3, "last": 5}
        found[f"resumes-{name}"] = ("own_disks", arguments)
    found["overflow"] = ("overflow", {"name": "2-fp16"})
    for stage in (0, 2):
        found[f"watched-{stage}"] = ("watched", {"stage": stage})
    found["detach"] = ("detach_leaves_nothing", {})
    found["again"] = ("attached_again", {})
    found["foreign"] = ("foreign", {})
    found["crowded"] = ("crowded", {})
    found["owners"] = ("owners", {})
    found["differing"] = ("differing", {"density": 0.02})  # the last: it leaves groups unusable
    return found


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a case -> its results on all ranks, of two islands."""
    arguments = {"cases": cases(tmp_path_factory.mktemp("islands"))}
    ranks = run_forked(4, "tests.helpers.gradient_islands", "run_all", arguments, timeout_s=350)
    return lambda name: results_of(ranks, name)


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_unpruned_it_is_plain_deepspeed(four: Any, kind: str) -> None:
    """Only the order of the sums differs; weights are rounded twice a step."""
    for found in four(f"dense-{kind}"):
        assert found["apart"] <= rounding_limit(found, kind, 2)
        assert found["step"] > 0.0


@pytest.mark.parametrize("name", PRUNED)
def test_parameters_are_equal_on_all_ranks_after_every_step(four: Any, name: str) -> None:
    first, *others = four(f"pruned-{name}")
    assert all(other["run"]["crcs"] == first["run"]["crcs"] for other in others)
    assert len(set(first["run"]["crcs"])) == 5
    assert first["residual"] > 0.0
    ranks = [first, *others]
    for step, report in enumerate(first["run"]["reports"]):
        mean = sum(rank["run"]["losses"][step] for rank in ranks) / 4
        assert report["loss"] == pytest.approx(mean, rel=1e-6)  # float32 in the header
    assert first["run"]["reports"] == others[0]["run"]["reports"]


@pytest.mark.parametrize("name", EXACT)
def test_what_is_not_sent_is_owed_by_one_rank_of_the_island(four: Any, name: str) -> None:
    lost = four(f"pruned-{name}")[0]["lost"]
    # Sums of four ranks and two micro-steps, added and taken off in fp32: a few units of rounding.
    bound = 32 * 2.0**-24 * lost.pop("largest")
    assert {key: error for key, error in lost.items() if error > bound} == {}


@pytest.mark.parametrize("name", CROSSING)
def test_a_host_sends_each_element_once(four: Any, name: str) -> None:
    found = four(f"crosses-{name}")[0]
    rounds = 2 if name.startswith("2") else 1  # stage 2 reduces in both micro-steps
    # Dense: an all-reduce between two islands, of every element of two steps in one rank's share.
    assert found["dense"]["sent"]["allreduce"] == 4 * found["numel"] * 2 * rounds
    pruned = found["pruned"]
    assert "allreduce" not in pruned["sent"]
    assert pruned["sent"]["all_gather_single"] == pruned["told"]
    if name.startswith("0"):  # DeepSpeed itself sends the norm, 4 bytes per step and rank
        rest = {key: size for key, size in pruned["sent"].items() if key != "all_gather_single"}
        assert sum(rest.values()) <= 3 * 2 * 4
    one, other = found["shares"][:2]
    assert one + other == 4 * found["numel"]  # the ranks of an island share its residual
    assert abs(one - other) <= 4 * 11  # one element of every parameter


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_from_disks_of_its_hosts_is_the_unbroken_one(four: Any, name: str) -> None:
    for answers in four(f"resumes-{name}"):
        assert answers["resumed"] == answers["unbroken"]


@pytest.mark.precision
def test_an_overflow_on_one_rank_skips_the_step_on_all(four: Any) -> None:
    first, *others = four("overflow")
    assert all(other == first for other in others)
    assert first["skipped"] == 1
    assert first["nonfinite"]
    assert first["weights_same"]
    assert first["residual_same"]


def test_owners_sum_the_shares(four: Any) -> None:
    first, *others = four("owners")
    assert all(other["crcs"] == first["crcs"] for other in others)
    assert len(set(first["crcs"])) == 6


@pytest.mark.parametrize("stage", [0, 2])
def test_a_batch_grows_while_deepspeed_looks_on(four: Any, stage: int) -> None:
    ranks = four(f"watched-{stage}")
    assert all(rank["crcs"] == ranks[0]["crcs"] for rank in ranks)
    assert ranks[0]["count"] == 4
    for step, report in enumerate(ranks[0]["reports"]):
        mean = sum(rank["losses"][step] for rank in ranks) / 4
        assert report["loss"] == pytest.approx(mean, rel=1e-6)  # float32 in the header
    assert {"gradient_pruning_density", "gradient_pruning_wire_mb"} <= set(ranks[0]["series"])


def test_detach_gives_everything_back(four: Any) -> None:
    assert four("detach") == [[]] * 4


def test_groups_do_not_pile_up(four: Any) -> None:
    """Every attach made five more; destroyed at once, a slower rank could not connect to them."""
    for first, *others in four("again"):
        assert others == [first, first]


def test_an_engine_with_groups_of_its_own_is_refused(four: Any) -> None:
    assert all("is all 4 ranks, got one of 2. Make it without an mpu" in t for t in four("foreign"))


def test_islands_of_several_ranks_do_not_let_gradients_leave_early(four: Any) -> None:
    """They would sum in another order, and the bits would be others."""
    for message in four("crowded"):
        assert 'overlap must be false with prune = "gradient" and 2 ranks per island' in message


def test_a_rank_that_differs_inside_its_island_is_found_by_all(four: Any) -> None:
    messages = four("differing")
    assert all("ranks no longer agree on their decisions" in text for text in messages)
