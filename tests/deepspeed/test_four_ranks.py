"""Islands of four ranks, two of them: the largest that tests run inside DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.fork_ranks import run_forked
from tests.helpers.ranks import results_of
from tests.helpers.zero_answers import Found, check_shares, kinds, of_all, of_one, rounding_limit

pytestmark = [pytest.mark.distributed, pytest.mark.zero, pytest.mark.timeout(300)]

TRIED = ("0-fp32", "2-fp32", "3-bf16")
DENSE = ("0-fp32", "2-fp32")
PRUNED = ("0-fp32", "2-overlap")


@pytest.fixture(scope="module")
def fours() -> Found:
    """Two islands of four ranks."""
    arguments = {"ranks": 4, "kinds": [*TRIED]}
    return run_forked(8, "tests.helpers.zero_cases", "run_kinds", arguments, timeout_s=250)


@pytest.mark.parametrize("kind", kinds(TRIED))
def test_dense_steps_are_plain_deepspeed(fours: Found, kind: str) -> None:
    for found in of_all(fours, kind, "warms_up"):
        assert found["warm"] <= rounding_limit(found, kind, 2, ranks=8)
        assert found["dense"] <= rounding_limit(found, kind, 4, ranks=8)
        assert found["crcs"][:4] == found["crcs"][4:]


@pytest.mark.parametrize("kind", kinds(TRIED))
def test_shared_weights_are_equal_after_every_step(fours: Found, kind: str) -> None:
    found = of_one(fours, kind, "shares")
    check_shares(found, 10)
    assert all(own == 2 * [True] + 8 * [False] for own in found["own"])
    first, last = found["losses"]
    assert last < first - 0.5


@pytest.fixture(scope="module")
def gradients() -> Any:
    """Name of a case -> its results on all ranks, of two islands of four ranks."""
    cases = {f"dense-{name}": ("dense", {"kind": name}) for name in DENSE}
    cases |= {f"pruned-{name}": ("pruned", {"name": name}) for name in PRUNED}
    arguments = {"cases": cases, "ranks": 4}
    ranks = run_forked(8, "tests.helpers.gradient_islands", "run_all", arguments, timeout_s=250)
    return lambda name: results_of(ranks, name)


@pytest.mark.parametrize("kind", DENSE)
def test_unpruned_gradients_are_plain_deepspeeds(gradients: Any, kind: str) -> None:
    for found in gradients(f"dense-{kind}"):
        assert found["apart"] <= rounding_limit(found, kind, 2, ranks=8)
        assert found["step"] > 0.0


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_gradients_keep_all_ranks_equal(gradients: Any, name: str) -> None:
    first, *others = gradients(f"pruned-{name}")
    assert all(other["run"]["crcs"] == first["run"]["crcs"] for other in others)
    assert len(set(first["run"]["crcs"])) == 5
    assert first["residual"] > 0.0
