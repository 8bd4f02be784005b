"""Engines whose islands may be lost: at every stage the others train on, save, and agree."""

from __future__ import annotations

import threading
import types
from pathlib import Path
from typing import Any

import pytest

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.deepspeed.survivors import refuse_unfit
from ds_gradprune.deepspeed.waits import watch
from ds_gradprune.errors import UnsupportedError
from tests.helpers import scripts
from tests.helpers.fork_ranks import run_forked

pytestmark = pytest.mark.timeout(150)  # ranks have 100 s

BF16 = {"bf16": True, "zero_optimization": {"stage": 2}}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "at", "block", "options"),
    [
        (1, 2, {}, {}),  # in the dense warm-up
        (0, 13, {"overlap": "auto", "sync_every": 4}, BF16),  # while an exchange travels
        (2, 7, {"residual": "reset"}, {"zero_optimization": {"stage": 3}}),
    ],
    ids=["stage 0, warm-up", "stage 2, hidden", "stage 3"],
)
def test_the_others_train_on_and_save(
    lost: int, at: int, block: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    given = {"block": block, "lost": lost, "at": at, "steps": 18, "folder": str(tmp_path)}
    told = run_forked(3, "tests.helpers.survivors_main", "train_on", given | options)
    first, second = (told[island] for island in range(3) if island != lost)
    assert first["crc"] == second["crc"]
    assert len(first["crc"]) == 18
    assert first["weight"] == second["weight"]
    assert first["senders"] == second["senders"]
    assert (first["senders"][at - 1], first["senders"][-1]) == (3, 2)
    assert (first["latest"], second["saved"]) == ("end", first["saved"])
    assert sum(name.startswith("gradient_pruning_island") for name in first["saved"]) == 2
    [warning] = [text for text in first["warnings"] if "did not answer" in text]
    assert f"2 go on without island {lost}, which did not answer" in warning
    assert not any("did not answer" in text for text in second["warnings"])
    # Silence of 5 s decides; then two exchanges at most.
    assert max(first["longest_s"], second["longest_s"]) < 10.0


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "at", "before", "block", "options"),
    [
        (3, 2, "", {}, {}),  # in the dense warm-up
        (2, 6, "announce", {}, {"zero_optimization": {"stage": 1}}),
        (0, 13, "", {"overlap": "auto", "sync_every": 4}, BF16),  # while an exchange travels
        (5, 7, "start", {"residual": "reset"}, {"zero_optimization": {"stage": 3}}),
    ],
    ids=["stage 0, warm-up", "stage 1, announce", "stage 2, hidden", "stage 3, start"],
)
def test_a_lost_rank_takes_its_island_along_and_no_other(
    lost: int,
    at: int,
    before: str,
    block: dict[str, Any],
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Three islands of two. In an exchange the other index has heard the lost island."""
    given = {"block": block | {"island": {"ranks": 2}}, "lost": lost, "at": at, "steps": 18}
    given |= {"folder": str(tmp_path), "before": before}
    told = run_forked(6, "tests.helpers.survivors_main", "train_on", given | options)
    fellow = told[lost ^ 1]
    assert fellow["fault"].startswith("Transport"), fellow["fault"]
    assert fellow["ended_s"] < 15.0  # timeout_s and five seconds
    left = [told[rank] for rank in range(6) if rank // 2 != lost // 2]
    assert [rank.get("fault") for rank in left] == [None] * 4
    for index in (0, 1):
        assert left[index]["crc"] == left[index + 2]["crc"]
        assert left[index]["senders"] == left[index + 2]["senders"]
        assert (len(left[index]["crc"]), left[index]["senders"][-1]) == (18, 2)
    assert len({(rank["weight"], str(rank["law"])) for rank in left}) == 1
    assert {rank["latest"] for rank in left} == {"end"}
    files = [name for name in left[0]["saved"] if name.startswith("gradient_pruning_island")]
    assert len(files) == 4
    [warning] = [text for text in left[0]["warnings"] if "did not answer" in text]
    assert f"2 go on without island {lost // 2}, which did not" in warning
    assert not any("did not answer" in text for rank in left[1:] for text in rank["warnings"])
    assert max(rank["longest_s"] for rank in left) < 15.0


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "options"),
    [
        ({"overlap": "auto"}, {}),  # an exchange travels when it is let in
        ({"overlap": "auto", "sync_every": 4}, BF16),
        ({"residual": "reset"}, {"zero_optimization": {"stage": 3}}),
    ],
    ids=["stage 0, hidden", "stage 2, hidden", "stage 3"],
)
def test_a_lost_island_comes_back(block: dict[str, Any], options: dict[str, Any]) -> None:
    environ = {"MASTER_PORT": scripts.free_port()}
    told = run_forked(
        3, "tests.helpers.return_main", "train", {"block": block} | options, env=environ
    )
    first, second, back = told
    assert (back["joined"], back["first"] > 5) == ({"seed": 3}, True)
    assert first["senders"] == second["senders"]
    assert {2, 3} == {*first["senders"].values()}
    assert back["senders"].items() <= first["senders"].items()
    assert first["crcs"] == second["crcs"]
    assert back["crcs"].items() <= first["crcs"].items()
    assert len(back["crcs"]) == 7
    # Moments and schedule are those of the first island.
    assert back["steps_of_adam"] == first["steps_of_adam"]
    assert back["rate"] == first["rate"]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "options"),
    [
        ({"overlap": "auto"}, {}),
        ({"overlap": "auto", "sync_every": 4}, BF16),
        ({"residual": "reset"}, {"zero_optimization": {"stage": 3}}),
    ],
    ids=["stage 0, hidden", "stage 2, hidden", "stage 3"],
)
def test_a_lost_island_of_two_ranks_comes_back_whole(
    block: dict[str, Any], options: dict[str, Any]
) -> None:
    """One of its ranks is killed, the other one ends by itself, and both are started again."""
    environ = {"MASTER_PORT": scripts.free_port()}
    given = {"block": block, "ranks": 2}
    told = run_forked(4, "tests.helpers.return_main", "train", given | options, env=environ)
    for first, back in zip(told[:2], told[2:], strict=True):
        assert (back["joined"], back["first"] > 5) == ({"seed": 3}, True)
        assert {1, 2} == {*first["senders"].values()}
        assert back["senders"].items() <= first["senders"].items()
        assert back["crcs"].items() <= first["crcs"].items()
        assert len(back["crcs"]) == 7
        assert back["steps_of_adam"] == first["steps_of_adam"]
        assert back["rate"] == first["rate"]
    assert told[0]["senders"] == told[1]["senders"]


def test_a_script_of_ones_own_is_not_ended_by_a_lost_island() -> None:
    """The thread that shows life to all ranks would end those that are left."""
    handle = types.SimpleNamespace(idle=False, crew=object())
    before = threading.active_count()
    with watch(types.SimpleNamespace(gradprune=handle)):
        assert threading.active_count() == before


def unfit(num_islands: int, **keys: Any) -> str:
    config = GradientPruningConfig.model_validate({"min_islands": 2} | keys)
    groups: Any = types.SimpleNamespace(num_islands=num_islands)
    with pytest.raises(UnsupportedError, match=r"^gradient_pruning\.min_islands") as caught:
        refuse_unfit(config, groups)
    return str(caught.value)


def test_islands_that_cannot_be_lost_one_by_one_are_refused() -> None:
    assert "at most the number of islands, 3, got 4" in unfit(3, min_islands=4)
    assert 'with 9 islands "auto" is owner_reduce' in unfit(9)
