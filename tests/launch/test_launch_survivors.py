"""With `min_islands` a lost rank does not end a run: the others train on, save, and finish."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import scripts
from tests.helpers.forked import Case, Doom, Ending, Nursery
from tests.helpers.scripts import arguments, block

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(200)]

TIMEOUT_S = 8.0
"""Ranks that start where others use the cores come seconds apart."""
STEP = "textgen.train:_step"
VALIDATION = "textgen.train:_validate"
SAVE = "deepspeed.runtime.engine:DeepSpeedEngine._save_checkpoint"


def run(nursery: Nursery, given: list[str], ranks: int, *dooms: Doom) -> list[Ending]:
    environ = {"MASTER_PORT": scripts.free_port()}
    return nursery.run(Case([given] * ranks, list(dooms), environ))


def config(folder: Path, **changes: Any) -> str:
    ours = {"timeout_s": TIMEOUT_S, "prune": "update", "throttle": None, "min_islands": 2}
    return str(scripts.write_config(folder / "config.json", **block(**ours | changes)))


@pytest.mark.parametrize(
    "doom",
    [
        Doom(2, STEP, 3, "kill"),
        Doom(1, STEP, 7, "stop"),
        Doom(2, VALIDATION, 2, "kill"),
        Doom(1, SAVE, 1, "kill"),
    ],
    ids=lambda doom: f"{doom.deed} {doom.rank} in {doom.at}",
)
def test_a_run_goes_on_without_a_lost_island(
    doom: Doom, nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = {"config": config(tmp_path), "eval_every": "5", "save_every": "6", "steps": "14"}
    endings = run(nursery, arguments(here, out, **flags), 3, doom)
    left = [rank for rank in range(3) if rank != doom.rank]
    assert [endings[rank].code for rank in left] == [0, 0], [end.told for end in endings]
    first = endings[left[0]].told
    if doom.rank:
        assert f"2 go on without island {doom.rank}, which did not answer" in first
    result = json.loads((out / "result.json").read_text())
    assert (result["steps"], result["islands_left"]) == (14, 2)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert (lines[0]["senders"], lines[-1]["senders"]) == (3, 2)
    # What the two have saved is a checkpoint of two.
    assert (out / "checkpoints" / "latest").read_text() == "step00000014"
    more = arguments(here, out, **flags | {"steps": "16"})
    resumed = run(nursery, [*more, "--resume"], 2)
    assert [ending.code for ending in resumed] == [0, 0], resumed[0].told
    assert json.loads((out / "result.json").read_text())["steps"] == 16


def test_a_lost_rank_comes_back(nursery: Nursery, here: Path, tmp_path: Path) -> None:
    """Rank 0, and the first time it is killed again while it is handed the weights."""
    out = tmp_path / "out"
    throttle = {"schedule": [{"step": 0, "rate_mbit": 1000, "latency_s": 0.03}]}
    # Every exchange compares the weights of the one before.
    path = config(tmp_path, throttle=throttle, verify_every_steps=1, warmup_steps=3)
    given = arguments(here, out, config=path, eval_every="40", save_every="40", steps="100")
    lives = [Doom(0, "ds_gradprune.wire.carry:_took", 2, "kill"), Doom(0, STEP, 0, "none")]
    case = Case([given] * 3, [Doom(0, STEP, 9, "kill")], {"MASTER_PORT": scripts.free_port()})
    endings = nursery.run(dataclasses.replace(case, lives=lives))
    assert [ending.code for ending in endings] == [0, 0, 0], [end.told for end in endings]
    assert "rank 0 takes part again after step" in endings[0].told
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 101))
    senders = [line["senders"] for line in lines]
    back = senders.index(3, 20)
    assert senders == [3] * 8 + [2] * (back - 8) + [3] * (100 - back)
    result = json.loads((out / "result.json").read_text())
    assert (result["steps"], result["islands_left"]) == (100, 3)
    assert [step for step, _ in result["val_losses"]] == [0, 40, 80, 100]


def test_two_come_back_at_once_and_one_freezes_in_its_first_save(
    nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    """While exchanges are hidden."""
    out = tmp_path / "out"
    throttle = {"schedule": [{"step": 0, "rate_mbit": 1000, "latency_s": 0.03}]}
    path = config(tmp_path, throttle=throttle, verify_every_steps=1, overlap="auto")
    given = arguments(here, out, config=path, eval_every="200", save_every="60", steps="90")
    dooms = [Doom(1, STEP, 9, "kill"), Doom(2, STEP, 9, "kill")]
    lives = [Doom(1, STEP, 0, "none"), Doom(2, SAVE, 1, "stop")]
    case = Case([given] * 4, dooms, {"MASTER_PORT": scripts.free_port()}, lives=lives)
    endings = nursery.run(case)
    assert [ending.code for ending in endings] == [0, 0, None, 0], [e.told for e in endings]
    for island in (1, 2):
        assert f"rank {island} takes part again after step" in endings[island].told
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 91))
    senders = [line["senders"] for line in lines]
    assert (senders[0], min(senders), max(senders[20:]), senders[-1]) == (4, 2, 4, 3)
    assert (out / "checkpoints" / "latest").read_text() == "step00000090"


PAIRS: dict[str, Any] = {"island": {"ranks": 2}, "min_islands": 1}


def test_a_frozen_rank_takes_its_island_of_two_along(
    nursery: Nursery, here: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = {"config": config(tmp_path, **PAIRS), "save_every": "6", "steps": "14"}
    endings = run(nursery, arguments(here, out, **flags), 4, Doom(3, STEP, 7, "stop"))
    assert [endings[rank].code for rank in (0, 1, 2)] == [0, 0, 2], [end.told for end in endings]
    [error] = endings[2].errors
    assert "rank 2 of 4" in error
    assert "gradient_pruning.timeout_s" in error
    result = json.loads((out / "result.json").read_text())
    assert (result["steps"], result["islands_left"]) == (14, 1)
    assert (out / "checkpoints" / "latest").read_text() == "step00000014"


def test_an_island_of_two_comes_back(nursery: Nursery, here: Path, tmp_path: Path) -> None:
    """One rank is killed, the other one ends, and both are started again."""
    out = tmp_path / "out"
    throttle = {"schedule": [{"step": 0, "rate_mbit": 1000, "latency_s": 0.03}]}
    path = config(tmp_path, throttle=throttle, verify_every_steps=1, warmup_steps=3, **PAIRS)
    given = arguments(here, out, config=path, eval_every="40", save_every="40", steps="100")
    lives = [Doom(2, STEP, 0, "none"), Doom(3, STEP, 0, "none")]
    case = Case([given] * 4, [Doom(3, STEP, 9, "kill")], {"MASTER_PORT": scripts.free_port()})
    endings = nursery.run(dataclasses.replace(case, lives=lives))
    assert [ending.code for ending in endings] == [0] * 4, [end.told for end in endings]
    for rank in (2, 3):
        assert f"rank {rank} takes part again after step" in endings[rank].told
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 101))
    senders = [line["senders"] for line in lines]
    back = senders.index(2, 20)
    assert senders == [2] * 8 + [1] * (back - 8) + [2] * (100 - back)
    assert json.loads((out / "result.json").read_text())["islands_left"] == 2


def test_saves_meet_hidden_exchanges(nursery: Nursery, here: Path, tmp_path: Path) -> None:
    """A save asks all ranks over the transport that an exchange under way uses in its thread."""
    out = tmp_path / "out"
    flags = {"config": config(tmp_path, overlap="auto"), "save_every": "2", "steps": "24"}
    endings = run(nursery, arguments(here, out, **flags), 3)
    assert [ending.code for ending in endings] == [0, 0, 0], [end.told for end in endings]
    assert (out / "checkpoints" / "latest").read_text() == "step00000024"


def test_a_signal_stops_all_at_one_exchange(nursery: Nursery, here: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = arguments(here, out, config=config(tmp_path), steps="400")
    endings = run(nursery, given, 2, Doom(1, STEP, 9, "terminate"))
    assert [ending.code for ending in endings] == [0, 0], endings[0].told
    result = json.loads((out / "result.json").read_text())
    assert result["stopped"] is True
    assert result["steps"] < 40


def test_too_few_end_typed(nursery: Nursery, here: Path, tmp_path: Path) -> None:
    given = arguments(here, tmp_path / "out", config=config(tmp_path, min_islands=3))
    endings = run(nursery, given, 3, Doom(1, STEP, 7, "kill"))
    assert [endings[rank].code for rank in (0, 2)] == [2, 2]
    [error] = [error for ending in endings for error in ending.errors]
    assert "min_islands 3 must be alive to go on, but only islands 0, 2 answered" in error
