"""The shipped configurations: each one is valid, starts a real engine, and says what it is for."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from ds_gradprune.config import BLOCK, load_block
from tests.helpers.ranks import run_processes

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "ds_configs").glob("*.json"))
OWN_LOOP = [path for path in FILES if not path.stem.startswith("finetune_")]
"""Of launch/train.py; those of launch/finetune.py are filled in by the Trainer."""


def parsed(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def quickstart_steps() -> int:
    script = (ROOT / "launch" / "quickstart.sh").read_text(encoding="utf-8")
    (steps,) = re.findall(r"--steps (\d+) --eval-every", script)
    return int(steps)


def test_the_promised_files_are_there() -> None:
    names = {path.stem for path in FILES}
    assert {"laptop", "ethernet_100mbit", "ethernet_1gbit", "gradient_1gbit", "dense"} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_block_is_valid(path: Path) -> None:
    load_block(parsed(path))


@pytest.mark.parametrize("path", OWN_LOOP, ids=lambda path: path.stem)
def test_uses_what_pruning_supports_and_needs_no_compiler(path: Path) -> None:
    config = parsed(path)
    assert config["zero_optimization"]["stage"] == 0
    assert config["optimizer"]["params"]["torch_adam"] is True  # else DeepSpeed compiles its own


@pytest.mark.parametrize("path", OWN_LOOP, ids=lambda path: path.stem)
def test_learning_rate_schedule_ends_where_the_optimizer_says(path: Path) -> None:
    config = parsed(path)
    schedule = config["scheduler"]["params"]
    assert (
        schedule.get("warmup_max_lr", config["optimizer"]["params"]["lr"])
        == (config["optimizer"]["params"]["lr"])
    )


def test_dense_is_the_laptop_without_pruning() -> None:
    laptop, dense = (parsed(ROOT / "ds_configs" / f"{n}.json") for n in ("laptop", "dense"))
    assert dense.pop(BLOCK) == {"enabled": False}
    laptop.pop(BLOCK)
    assert laptop == dense


def test_quickstart_sees_the_link_drop_and_recover() -> None:
    steps = quickstart_steps()
    block = load_block(parsed(ROOT / "ds_configs" / "laptop.json"), steps)
    assert block.throttle is not None
    schedule = block.throttle.schedule
    assert [point.rate_mbit for point in schedule] == [20, 5, 20]
    # Before the drop, between, and after the recovery there must be time to react: a window's worth
    # after the dense steps, then as many again.
    edges = [block.warmup_steps + block.ramp_steps, *(p.step for p in schedule[1:]), steps]
    assert all(b - a >= block.window_size for a, b in itertools.pairwise(edges)), edges


@pytest.mark.distributed
def test_every_file_starts_through_the_real_entry_point() -> None:
    paths = [str(path) for path in OWN_LOOP]
    first, second = run_processes(
        2, "tests.helpers.ds_configs_main", "start_from", {"paths": paths}
    )
    for path in OWN_LOOP:
        answer = first[path.name]
        enabled = load_block(parsed(path)).enabled
        assert answer["steps"] == 1
        assert len(answer["losses"]) == parsed(path)["gradient_accumulation_steps"]
        assert all(math.isfinite(loss) for loss in answer["losses"])
        assert answer["idle"] is not enabled
        assert answer["crc"] == second[path.name]["crc"]
