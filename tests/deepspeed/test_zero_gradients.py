"""Pruned gradients at ZeRO stages 1 and 2, inside DeepSpeed: two processes on gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fork_ranks import run_forked
from tests.helpers.zero_gradient_bench import EXACT, KINDS, STEPS

pytestmark = [
    pytest.mark.zero,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(400),
]

RESUMED = ("1-bf16-sums", "2-fp32")
OVERFLOWN = ("1-fp16", "2-fp16")
DENSITIES = {"dense": 1.0, "pruned": 0.02}


def cases(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Everything that shares one pair of processes."""
    found: dict[str, tuple[str, dict[str, Any]]] = {
        name: ("kind", {"name": name}) for name in KINDS
    }
    for name in RESUMED:
        arguments = {"folder": str(folder), "name": name, "at": 3, "last": 6}
        found[f"resumes-{name}"] = ("resumes", arguments)
    for name in OVERFLOWN:
        found[f"overflow-{name}"] = ("overflow", {"name": name})
    for stage in (1, 2):
        found[f"together-{stage}"] = ("without_rounds", {"stage": stage})
    found["owners"] = ("owners", {})
    found["warned-1"] = ("warned", KINDS["1-bf16-sums"])
    found["warned-2"] = ("warned", {"stage": 2})
    found["detach"] = ("detach_leaves_nothing", {})
    found["stage-3"] = ("refused", {"stage": 3})
    for name, density in DENSITIES.items():
        found[f"differing-{name}"] = ("differing", {"density": density})
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a case -> its results on both ranks."""
    arguments = {"cases": cases(tmp_path_factory.mktemp("zero"))}
    module = "tests.helpers.zero_gradient_cases"
    ranks = run_forked(2, module, "run_all", arguments, timeout_s=350)

    def results(name: str) -> list[Any]:
        last = [f"rank {rank}: {[*done.values()][-1]}" for rank, done in enumerate(ranks)]
        assert all(name in done for done in ranks), "an earlier case failed\n" + "\n".join(last)
        found = [done[name] for done in ranks]
        for rank, result in enumerate(found):
            failed = isinstance(result, str) and "Traceback" in result
            assert not failed, f"rank {rank}: {result}"
        return found

    return results


@pytest.mark.parametrize("name", KINDS)
def test_a_dense_run_has_the_bits_of_plain_deepspeed(two: Any, name: str) -> None:
    for answers in two(name):
        assert answers["dense"]["crcs"] == answers["plain"]["crcs"]
        assert answers["dense"]["losses"] == answers["plain"]["losses"]


@pytest.mark.parametrize("name", KINDS)
def test_pruned_parameters_are_equal_on_all_ranks_after_every_step(two: Any, name: str) -> None:
    one, other = two(name)
    assert one["pruned"]["crcs"] == other["pruned"]["crcs"]
    assert len(set(one["pruned"]["crcs"])) == STEPS
    # Two warm-up steps, and then something else than the dense run.
    assert one["pruned"]["crcs"][:2] == one["plain"]["crcs"][:2]
    assert one["pruned"]["crcs"][2] != one["plain"]["crcs"][2]
    assert one["residual"] > 0.0


@pytest.mark.parametrize("name", KINDS)
def test_a_step_reports_its_mean_loss_and_all_its_bytes(two: Any, name: str) -> None:
    one, other = two(name)
    for step, report in enumerate(one["pruned"]["reports"]):
        mean = (one["pruned"]["losses"][step] + other["pruned"]["losses"][step]) / 2
        assert report["step"] == step + 1
        assert report["loss"] == pytest.approx(mean, rel=1e-6)  # float32 in the header
    last, first = one["pruned"]["reports"][-1], one["pruned"]["reports"][0]
    assert first["density"] == 1.0
    assert last["wire_bytes"] < last["dense_bytes"] / 4  # buckets are tiny here, and headers count


@pytest.mark.parametrize("name", EXACT)
def test_nothing_is_lost_what_is_not_sent_is_owed(two: Any, name: str) -> None:
    lost = two(name)[0]["lost"]
    # Sums of two ranks and two micro-steps, added and taken off in fp32: a few units of rounding.
    bound = 16 * 2.0**-24 * lost.pop("largest")
    assert {key: error for key, error in lost.items() if error > bound} == {}


def test_stage_2_exchanges_in_every_micro_step_and_stage_1_once(two: Any) -> None:
    first, second = (two(name)[0]["pruned"]["reports"][-1] for name in ("1-fp32", "2-fp32"))
    assert second["wire_bytes"] == 2 * first["wire_bytes"]
    assert second["dense_bytes"] == 2 * first["dense_bytes"]


@pytest.mark.parametrize("stage", [1, 2])
def test_micro_steps_that_are_reduced_together_take_one_exchange(two: Any, stage: int) -> None:
    one, other = two(f"together-{stage}")
    once = two("1-fp32")[0]["pruned"]["reports"][-1]["wire_bytes"]
    assert one["crcs"] == other["crcs"]
    for step, (told, loss, wire_bytes) in enumerate(one["reports"]):
        mean = (one["losses"][step] + other["losses"][step]) / 2
        assert (told, loss) == (step + 1, pytest.approx(mean, rel=1e-6))
        assert step < 2 or wire_bytes == once


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_unbroken_one(two: Any, name: str) -> None:
    for answers in two(f"resumes-{name}"):
        assert answers["resumed"] == answers["unbroken"]


@pytest.mark.parametrize("name", OVERFLOWN)
def test_an_overflow_skips_the_step_everywhere_and_touches_no_residual(two: Any, name: str) -> None:
    one, other = two(f"overflow-{name}")
    assert one == other
    assert one["skipped"] == 1
    assert one["nonfinite"]
    assert one["weights_same"]
    assert one["residual_same"]


def test_owners_sum_shares_in_both_rounds_of_a_step(two: Any) -> None:
    one, other = two("owners")
    assert one["crcs"] == other["crcs"]
    assert len(set(one["crcs"])) == 6


def test_attach_names_what_the_parameters_cost_and_update_mode(two: Any) -> None:
    (first,), others = two("warned-1")
    assert others == []
    assert 'prune = "gradient" at ZeRO stage 1 prunes gradients only' in first
    assert "each rank also sends 0.003 MB of whole parameters over the network" in first
    assert 'prune = "update" sends no whole parameters' in first
    assert "micro-steps" not in first
    assert "in each of the 2 micro-steps of a step" in two("warned-2")[0][0]


def test_detach_gives_everything_back(two: Any) -> None:
    assert two("detach") == [[], []]


def test_stage_3_is_refused_by_name(two: Any) -> None:
    assert all("(stages that it takes: 0, 1, 2)" in text for text in two("stage-3"))


@pytest.mark.parametrize("name", DENSITIES)
def test_ranks_that_reduce_other_parameters_are_found_first(two: Any, name: str) -> None:
    one, other = two(f"differing-{name}")
    assert one == other
    assert "ranks no longer agree on their decisions or parameters: history is" in one
