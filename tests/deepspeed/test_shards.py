"""Shards and groups of real engines: two islands of one rank, and two of two, on gloo."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.fork_ranks import run_forked
from tests.helpers.shard_cases import FILES, KINDS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(500)]

CASES = "tests.helpers.shard_cases"
INEXACT = {
    "1-fp32-sums": "our mean over islands is fp32, DeepSpeed's sum over all ranks bf16",
    "2-fp32-sums": "the same",
    "2-autocast": "the same",
    "2-offload": "offloaded gradients are fp32",
    "3-offload": "offloaded gradients are fp32",
    "3-bf16": "DeepSpeed rounds the sum over all ranks in every micro-step",
}
"""Kinds whose warm-up differs in its bits from plain DeepSpeed, and why."""

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Two islands of two ranks: what every rank found."""
    folder = str(tmp_path_factory.mktemp("shards"))
    return run_forked(4, CASES, "run_pairs", {"folder": folder}, timeout_s=450)


@pytest.fixture(scope="module")
def singles() -> Found:
    """Two islands of one rank."""
    return run_forked(2, CASES, "run_singles", timeout_s=300)


def _found(ranks: Found, kind: str, check: str) -> list[Any]:
    faults = [checks["fault"] for found in ranks for checks in found.values() if "fault" in checks]
    assert not faults, faults[0]
    return [found[kind][check] for found in ranks]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_cover_every_trained_element_once(pairs: Found, singles: Found, kind: str) -> None:
    # At stage 0 in fp32 the optimizer knows the frozen layer, so only the buffer is left.
    rest = {"0-fp32": (0, 1)}.get(kind, (2, 1) if kind[0] == "3" else (0, 3))
    for ranks, share in ((singles, 1.0), (pairs, 0.5)):
        for answer in _found(ranks, kind, "covers"):
            assert answer.pop("share") == pytest.approx(share, abs=0.01)
            assert answer == {
                "once": True,
                "alike": True,
                "flat": True,
                "pruned": ["down.weight", "embed.weight", "up.weight"],
                "has_masters": kind != "0-fp32",
                "rest": rest,
            }


@pytest.mark.parametrize("kind", KINDS)
def test_islands_step_without_each_other(pairs: Found, singles: Found, kind: str) -> None:
    for answer in [*_found(pairs, kind, "parts"), *_found(singles, kind, "parts")]:
        assert answer == {"apart": True, "alone": True, "one": True}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_into_pieces_reaches_the_model(
    pairs: Found, singles: Found, kind: str
) -> None:
    is_rounded = "dtype" in KINDS[kind]
    for answer in [*_found(pairs, kind, "publishes"), *_found(singles, kind, "publishes")]:
        assert answer.pop("error") < (2e-2 if is_rounded else 2e-6)
        assert answer == {"inside": True, "frozen": True, "one": True, "stepped": True}


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_on_in_another_engine(pairs: Found, kind: str) -> None:
    for answer in _found(pairs, kind, "resumes"):
        assert answer == {"goes_on": True, "published": True, "in_place": True, "plain": True}


@pytest.mark.parametrize("kind", FILES)
def test_island_0_writes_the_files_and_all_read_them(pairs: Found, kind: str) -> None:
    stage, bf16 = kind[0], "bf16_" if KINDS[kind].get("dtype") == "bf16" else ""
    wanted = ["mp_rank_00_model_states.pt"]
    if stage == "3":
        wanted = [f"zero_pp_rank_{i}_mp_rank_00_model_states.pt" for i in (0, 1)]
    if stage != "0":
        wanted += [f"{bf16}zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in (0, 1)]
    for rank, answer in enumerate(_found(pairs, kind, "files")):
        assert answer == {
            "files": sorted(wanted),
            "weights": True,
            "masters": True,
            "flag": stage == "3" or rank == 0,
        }


@pytest.mark.parametrize("kind", KINDS)
def test_dense_warm_up_is_plain_deepspeed(pairs: Found, singles: Found, kind: str) -> None:
    for answer in _found(pairs, kind, "warms_up"):
        assert answer == {"alike": True, "fault": None}
    for answer in _found(singles, kind, "warms_up"):
        # With one rank per island the sums have the same order, so the same bits.
        assert answer.pop("off") <= (0.1 if kind in INEXACT else 0.0)
        assert answer == {"alike": True, "fault": None}


def test_groups_orders_freezing_overflow_and_zero_init() -> None:
    answers = run_forked(4, CASES, "run_odd", timeout_s=200)
    assert [a["place"] for a in answers] == [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2)]
    assert [a["outer"] for a in answers] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [a["inner"] for a in answers] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    for rank, answer in enumerate(answers):
        assert answer["clean"]
        assert "modules in different orders: ranks [1] of the island" in answer["orders"]
        plain, flat = answer["frozen"]
        assert plain in (([], True), (["up.weight"], True))
        assert flat == ([], True)  # DeepSpeed steps it on, so it is exchanged
        assert answer["steps"] == [rank < 2] * 3
        assert answer["divided"] == ([True] * 3, [True] * 3)
    assert {name for a in answers for name in a["frozen"][0][0]} == {"up.weight"}
    assert "has left weight divided among ranks [0, 1, 2]" in answers[0]["refused"]
