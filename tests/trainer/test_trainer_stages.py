"""The Trainer's checkpoints at every ZeRO stage and precision: saved, resumed, equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.conftest import EVALUATING, SAVING, result, two_ranks

pytestmark = [pytest.mark.trainer, pytest.mark.distributed, pytest.mark.timeout(300)]

Runs = dict[str, list[Any]]
ISLANDS = [(0, False), (0, True), (1, True), (2, False), (2, True), (3, False), (3, True)]
KINDS = [(*kind, "update") for kind in ISLANDS] + [(s, False, "gradient") for s in (1, 2)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def stages(home: Path) -> Runs:
    cases: dict[str, tuple[str, dict[str, Any]]] = {}
    for stage, bf16, prune in KINDS:
        folder = str(home / f"{stage}{bf16}{prune}")
        arguments: dict[str, Any] = {"folder": folder, "block": {"prune": prune}}
        arguments |= {"stage": stage, "bf16": bf16}
        arguments |= {"gradient_accumulation_steps": 2} | SAVING | EVALUATING
        cases[f"{stage}{bf16}{prune}"] = ("train", arguments)
        middle = f"{folder}/checkpoint-4"
        cases[f"{stage}{bf16}{prune} again"] = ("train", arguments | {"resume": middle})
    return two_ranks(cases)


@pytest.mark.parametrize(("stage", "bf16", "prune"), KINDS)
def test_saved_model_is_what_all_ranks_share(
    stage: int, bf16: bool, prune: str, stages: Runs, home: Path
) -> None:
    one, other = result(stages, f"{stage}{bf16}{prune}")
    assert [row[:4] for row in one["seen"]] == [row[:4] for row in other["seen"]]
    assert one["evaluated"] == other["evaluated"]
    assert one["logged"][-1] < one["logged"][0]
    saved = load_file(home / f"{stage}{bf16}{prune}" / "checkpoint-8" / "model.safetensors")
    assert saved
    for name, value in saved.items():
        assert torch.equal(value, one["final"][name])
        assert torch.equal(value, other["final"][name])


@pytest.mark.parametrize(("stage", "bf16", "prune"), KINDS)
def test_resumed_run_is_the_unbroken_one(stage: int, bf16: bool, prune: str, stages: Runs) -> None:
    before, after = (
        result(stages, f"{stage}{bf16}{prune}"),
        result(stages, f"{stage}{bf16}{prune} again"),
    )
    for unbroken, resumed in zip(before, after, strict=True):
        assert resumed["seen"] == unbroken["seen"][4:]
        assert resumed["logged"] == unbroken["logged"]
        assert resumed["evaluated"] == unbroken["evaluated"]
        for name, value in unbroken["final"].items():
            assert torch.equal(value, resumed["final"][name])
