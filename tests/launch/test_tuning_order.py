"""A fine-tuning goes on with other numbers of ranks: no sequence twice, none left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_gradprune.errors import CheckpointError
from launch.support.tuning_order import Order, Since, read_since, write_since
from tests.helpers import finetune_main, scripts
from tests.helpers.forked import Case, Nursery

ROWS = [{"input_ids": [number], "labels": [number]} for number in range(10)]
SEGMENTS = ((4, 2), (7, 3), (9, 1), (20, 4))
"""The step after which it stops, and sequences per step until then."""


def test_an_epoch_uses_every_sequence_once_whatever_the_sizes_are() -> None:
    since, used = Since(), []
    for steps, per_step in SEGMENTS:
        order = Order(ROWS, 5, steps, per_step, since)
        assert len(order) == steps * per_step
        used += [order[index] for index in range(since.step * per_step, len(order))]
        since = Since(steps, since.after(steps, per_step), per_step)
    assert len(used) == since.sequences == 4 * 2 + 3 * 3 + 2 * 1 + 11 * 4
    whole = Order(ROWS, 5, len(used), 1, Since())
    assert used == [whole[index] for index in range(len(used))]
    epochs = [[row["input_ids"][0] for row in used[first : first + 10]] for first in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_what_a_checkpoint_says_of_its_place_is_read_again(tmp_path: Path) -> None:
    write_since(tmp_path, Since(3, 18, 2))
    assert read_since(tmp_path) == Since(3, 18, 2)
    (tmp_path / "position.json").write_text('{"step": 3')
    with pytest.raises(CheckpointError, match=r"position\.json must say which sequences were used"):
        read_since(tmp_path)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.trainer
def test_fine_tuning_goes_on_with_another_number_of_ranks(nursery: Nursery, tmp_path: Path) -> None:
    """It was refused, so a run under launch/supervise.py ended with the first host that did."""
    finetune_main.write_model(tmp_path / "model")
    finetune_main.write_questions(tmp_path / "qa.jsonl")
    optimizer = {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}}
    config = {"optimizer": optimizer, "gradient_pruning": {"warmup_steps": 2, "window_size": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    places = {"--model": "model", "--data": "qa.jsonl", "--config": "config.json", "--out": "out"}
    given = [part for flag, name in places.items() for part in (flag, str(tmp_path / name))]
    given += ["--max-length", "48", "--save-every", "4"]
    for ranks, steps, more in ((2, 6, []), (3, 10, ["--resume"])):
        environ = {"MASTER_PORT": scripts.free_port(), "LOCAL_WORLD_SIZE": str(ranks)}
        flags = [*given, "--steps", str(steps), *more]
        case = Case([flags] * ranks, [], environ, 90.0, "launch.finetune:main")
        endings = nursery.run(case)
        assert [ending.code for ending in endings] == [0] * ranks, endings[0].told
    assert "note: 2 ranks have trained so far, now 3: a step takes 12 sequences" in endings[0].told
    assert read_since(tmp_path / "out" / "checkpoints" / "checkpoint-10") == Since(10, 96, 3)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["steps"] == 10
    assert result["val_loss"] < result["val_loss_start"]
