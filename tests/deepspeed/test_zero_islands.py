"""Update mode at every ZeRO stage and precision: islands of one rank and of two, on gloo."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.helpers.fork_ranks import run_forked
from tests.helpers.zero_answers import (
    ROUNDED,
    Found,
    check_shares,
    kinds,
    of_all,
    of_one,
    rounding_limit,
)
from tests.helpers.zero_cases import KINDS
from tests.helpers.zero_features import STAGES, WAYS
from tests.helpers.zero_refusals import GRADIENT_REFUSED, PIPELINE, REFUSED

pytestmark = [pytest.mark.distributed, pytest.mark.zero, pytest.mark.timeout(600)]

INEXACT = {
    "1-fp32-sums": "our mean over islands is fp32, DeepSpeed's sum over all ranks bf16",
    "2-offload": "offloaded gradients are fp32",
    "3-offload": "the same",
}
"""Kinds whose warm-up differs from plain DeepSpeed in its bits, with one rank per island too."""


# ---- warm-up, dense exchanges, pruned exchanges --------------------------------------------------


@pytest.fixture(scope="module")
def pairs() -> Found:
    """Two islands of two ranks."""
    return run_forked(4, "tests.helpers.zero_cases", "run_kinds", {"ranks": 2}, timeout_s=250)


@pytest.fixture(scope="module")
def singles() -> Found:
    """Two islands of one rank."""
    return run_forked(2, "tests.helpers.zero_cases", "run_kinds", {"ranks": 1}, timeout_s=250)


@pytest.mark.parametrize("kind", kinds(KINDS))
def test_the_warmup_is_plain_deepspeed(pairs: Found, singles: Found, kind: str) -> None:
    for number, islands in ((1, singles), (2, pairs)):
        for found in of_all(islands, kind, "warms_up"):
            assert found["warm"] <= rounding_limit(found, kind, 2)
            assert len(set(found["crcs"])) <= number  # one hash per shard
            if number == 1 and kind not in INEXACT:  # the order of the sums is the same
                assert found["warm"] == 0.0


@pytest.mark.parametrize("kind", kinds(KINDS))
def test_a_dense_exchange_is_plain_deepspeed(pairs: Found, singles: Found, kind: str) -> None:
    for islands in (singles, pairs):
        for found in of_all(islands, kind, "warms_up"):
            assert found["dense"] <= rounding_limit(found, kind, 4)


@pytest.mark.parametrize("kind", kinds(KINDS))
def test_shared_weights_are_equal_after_every_step(pairs: Found, singles: Found, kind: str) -> None:
    for islands in (singles, pairs):
        found = of_one(islands, kind, "shares")
        check_shares(found, 10)
        assert found["densities"] == [1.0] + 9 * [41 / 4096]
        assert all(own == 2 * [True] + 8 * [False] for own in found["own"])
        first, last = found["losses"]
        assert last < first - 0.5


# ---- what people add -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features() -> Found:
    """Two islands of two ranks."""
    return run_forked(4, "tests.helpers.zero_features", "run_features", timeout_s=550)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_exchanging(features: Found, way: str) -> None:
    rare = {"sync_every": 3, "throttle": 2}
    exchanges = next((rare[key] for key in WAYS[way][1] if key in rare), None)
    found = of_one(features, way, "shares")
    check_shares(found, 9, exchanges)
    if way.startswith("slow"):  # islands have parted in the first step
        assert not any(map(any, found["own"]))


@pytest.mark.parametrize("stage", STAGES)
def test_everything_people_add_to_a_training(features: Found, stage: int) -> None:
    """Accumulation, clipping, predivide, groups; tied, frozen, unused, checkpointed layers.

    Watched by a monitor, DeepSpeed's profiler and its breakdown of the wall clock.
    """
    for found in of_all(features, "everything", str(stage)):
        unit = ROUNDED["fp32"]
        assert found["off"] <= 2 * 3 * unit * (8 * found["step"] + 2 * found["weight"])
        check_shares(found["shares"], 6)
        assert {"gradient_pruning_density", "gradient_pruning_wire_mb"} <= set(found["series"])


@pytest.mark.parametrize("stage", STAGES)
def test_only_adapters_are_exchanged(features: Found, stage: int) -> None:
    found = of_one(features, "adapters", str(stage))
    assert found["moved"] == ["low.weight", "high.weight"]
    assert found["held"] == 4 * 2 * 128  # fp32 on both ranks of an island
    assert found["dense"] == 4 * 2 * 128
    assert found["sent"] < found["dense"] // 3
    assert found["crcs"][:2] == found["crcs"][2:]


@pytest.mark.parametrize("stage", STAGES)
def test_optimizers_and_schedules_of_the_client(features: Found, stage: int) -> None:
    check_shares(of_one(features, "clients", str(stage)), 6)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_muon(features: Found, stage: int) -> None:
    check_shares(of_one(features, "muon", str(stage)), 6)


@pytest.mark.parametrize(
    ("way", "stage"),
    [*(("no_sync", stage) for stage in STAGES), *(("direct", stage) for stage in STAGES[1:])],
)
def test_steps_in_other_ways(features: Found, way: str, stage: int) -> None:
    for found in of_all(features, way, str(stage)):
        assert found["off"] <= 2 * 3 * 2.0**-24 * (8 * 0.3 + 2 * 5)  # as in `rounding_limit`
        assert found["crcs"][:2] == found["crcs"][2:]
        assert found["steps"] == 5


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_batch_size_changes(features: Found, stage: int) -> None:
    for found in of_all(features, "batch", str(stage)):
        assert found["count"] == 3
        assert found["crcs"][:2] == found["crcs"][2:]
        assert found["loss"] < 2e-6  # the header's loss is fp32, near 12


@pytest.mark.precision
@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_costs_one_island_one_step(features: Found, stage: int) -> None:
    found = of_one(features, "overflow", str(stage))
    assert [skipped for skipped, _ in found["warm"]] == [1] * 4  # gradients are everybody's
    assert found["warm"][:2] == found["warm"][2:]
    assert [skipped for skipped, _, _ in found["apart"]] == [1, 1, 2, 2]
    crcs = [crc for _, crc, _ in found["apart"]]
    assert crcs[:2] == crcs[2:]
    scales = [scale for _, _, scale in found["apart"]]
    assert scales == [scales[0]] * 2 + [scales[0] / 2] * 2
    assert found["steps"] == [(5, 5)] * 4


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_with_nothing_to_exchange(features: Found, stage: int) -> None:
    values = of_one(features, "few", str(stage))["crcs"]
    assert len(set(values)) == 1
    assert values[0] != 1.0


@pytest.mark.parametrize("stage", STAGES)
def test_the_weights_of_rank_0_hold(features: Found, stage: int) -> None:
    found = of_one(features, "seeds", str(stage))
    assert len(set(found["weights"])) == 1
    assert found["masters"][:2] == found["masters"][2:]


@pytest.mark.parametrize("stage", [0, 2])
def test_ranks_with_clocks_of_their_own_decide_alike(features: Found, stage: int) -> None:
    first, *others = of_one(features, "measured", str(stage))["decisions"]
    assert all(other == first for other in others)
    assert min(first) < 0.1


def test_a_model_that_was_divided_among_all_ranks(features: Found) -> None:
    check_shares(of_one(features, "divided", "3"), 6)


@pytest.mark.parametrize("when", ["fresh", "trained"])
@pytest.mark.parametrize("name", ["load_optimizer_states", "load_module_only"])
@pytest.mark.parametrize("stage", STAGES)
def test_weights_of_a_checkpoint_alone(features: Found, stage: int, name: str, when: str) -> None:
    """Moments and schedules stay the islands' own, so gradients are not averaged any more."""
    found = of_one(features, "reloads", str(stage))[f"{name}, {when}"]
    # Plain DeepSpeed, too, loads nothing at stage 3 with load_module_only.
    is_loaded = (stage, name) != (3, "load_module_only")
    assert found["same"] == [is_loaded] * 4
    assert found["near"] == [is_loaded] * 4  # after a step, too
    assert found["step"] == [0]
    assert found["crcs"][:2] == found["crcs"][2:]


@pytest.mark.parametrize("stage", STAGES)
def test_an_evaluation_between_forward_and_backward(features: Found, stage: int) -> None:
    for found in of_all(features, "between", str(stage)):
        assert all(found["same"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_compiled_engine(features: Found, stage: int) -> None:
    found = of_one(features, "compiled", str(stage))
    assert found["view"] == (True, True)
    assert found["crcs"][:2] == found["crcs"][2:]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refusals() -> list[dict[str, Any]]:
    """Two islands of two ranks."""
    return run_forked(4, "tests.helpers.zero_refusals", "run_refusals")


def _marked(names: Iterable[str]) -> list[Any]:
    return [pytest.param(n, marks=[pytest.mark.pipeline] if n == PIPELINE else []) for n in names]


@pytest.mark.parametrize("name", _marked(REFUSED))
def test_what_islands_cannot_serve_is_refused_by_name(refusals: Any, name: str) -> None:
    for found in refusals:
        assert found[name].startswith("UnsupportedError: ")
        assert name in found[name]


@pytest.mark.parametrize("name", _marked(GRADIENT_REFUSED))
def test_what_gradient_mode_cannot_serve_is_refused_by_name(refusals: Any, name: str) -> None:
    for found in refusals:
        assert found[f"gradient, {name}"].startswith("UnsupportedError: ")
        assert name in found[f"gradient, {name}"]
        assert "islands" not in found[f"gradient, {name}"]


def test_it_is_refused_before_deepspeed_makes_an_engine(refusals: Any) -> None:
    """Muon at stage 2 compiled for a minute first, and a large model was divided."""
    assert [found["engines"] for found in refusals] == [0] * 4
