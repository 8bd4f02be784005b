"""What people add to a training, with pruned gradients: two processes on gloo."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.fork_ranks import run_forked
from tests.helpers.gradient_features import KINDS
from tests.helpers.ranks import results_of

pytestmark = [
    pytest.mark.zero,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(250),
]

PAIRS = [(name, stage) for name, (_, stages) in KINDS.items() for stage in stages]
STAGES = (0, 1, 2)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each of the two ranks has found, by case."""
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        f"{name}-{stage}": (
            "eagerly" if name == "muon" else "feature",
            {"name": name, "stage": stage},
        )
        for name, stage in PAIRS
    }
    cases |= {f"summed-{stage}": ("summed", {"stage": stage}) for stage in STAGES}
    cases |= {f"mixed-{stage}": ("mixed", {"stage": stage}) for stage in STAGES[1:]}
    module = "tests.helpers.gradient_features"
    return run_forked(2, module, "run_all", {"cases": cases}, timeout_s=200)


@pytest.mark.parametrize(("name", "stage"), PAIRS)
def test_a_dense_run_is_plain_deepspeed_and_pruned_ranks_stay_equal(
    ranks: list[dict[str, Any]], name: str, stage: int
) -> None:
    for found in results_of(ranks, f"{name}-{stage}"):
        assert found["dense"] == found["plain"]
        assert found["pruned"][0] == found["pruned"][1] != found["plain"]
        assert found["loss"] < 2e-6  # the header's loss is fp32, near 12


@pytest.mark.parametrize("stage", STAGES)
def test_only_adapters_are_exchanged(ranks: list[dict[str, Any]], stage: int) -> None:
    for found in results_of(ranks, f"adapters-{stage}"):
        assert found["elements"] == found["trained"] == 2 * 16 * 8


@pytest.mark.parametrize("stage", STAGES)
def test_summed_gradients_are_averaged_ones_times_two(
    ranks: list[dict[str, Any]], stage: int
) -> None:
    for found in results_of(ranks, f"summed-{stage}"):
        assert len(set(found["crcs"])) == 1


@pytest.mark.parametrize("stage", STAGES[1:])
def test_layers_that_only_some_ranks_train_are_not_mixed(
    ranks: list[dict[str, Any]], stage: int
) -> None:
    for found in results_of(ranks, f"mixed-{stage}"):  # findings/deepspeed_mixes_gradients.sh
        assert "use the same parameters in every step" in found["told"]
