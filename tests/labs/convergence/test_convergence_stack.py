"""Runs that are made side by side, and the campaign that makes them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_gradprune.errors import NonFiniteError
from labs.convergence import campaign
from labs.convergence.adamw import AdamW
from labs.convergence.base import DenseSimulation, Setting
from labs.convergence.gpt import Gpt
from labs.convergence.grid import Dense, DiLoCo, Method, Train, Update
from labs.convergence.islands import UpdateSimulation
from labs.convergence.stack import Stack
from labs.convergence.text import Text
from labs.convergence.trial import run_stack, run_trial
from tests.labs.convergence.cases import SHAPE, TRAIN, tokens

TIMES = ("run_s", "cpu_s")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(range(32, 102)) * 60)
    return Text(path, SHAPE.context)


def settings(pairs: Sequence[tuple[float, int]]) -> list[Setting]:
    """Of (learning rate, seed)."""
    gpt = Gpt(SHAPE, 70)
    trains = [TRAIN.model_copy(update={"lr": lr}) for lr, _ in pairs]
    return [Setting(gpt, t, 2, 8, seed) for t, (_, seed) in zip(trains, pairs, strict=True)]


METHODS: list[Method] = [
    Update(kind="update", name="rounds", sync_every=2, density=0.05, value_bits=2),
    Update(kind="update", name="used", density=0.05, local_lr=0.5),
    DiLoCo(kind="diloco", name="all", sync_every=3),
]


@pytest.mark.parametrize(
    ("methods", "pairs"),
    [
        (METHODS, [(1e-3, 0), (1e-3, 1), (2e-3, 1)]),
        ([Dense(kind="dense", name="dense")] * 3, [(1e-3, 0), (1e-3, 1), (2e-3, 1)]),
    ],
    ids=["islands", "dense"],
)
def test_a_run_of_a_stack_is_the_run_alone(
    text: Text, methods: list[Method], pairs: list[tuple[float, int]]
) -> None:
    own = settings(pairs)
    together = run_stack(own, methods, text)
    alone = [run_trial(*pair, text) for pair in zip(own, methods, strict=True)]
    for one, other in zip(together, alone, strict=True):
        for key in TIMES:
            del one[key], other[key]
        assert one == other
    assert len({run["val_loss"] for run in alone}) == 3


def test_a_run_that_stops_leaves_the_others() -> None:
    first, second = (
        UpdateSimulation(s, Update(kind="update", name="u", density=0.05))
        for s in settings([(1e-3, 0), (1e-3, 1)])
    )
    stack = Stack([first, second])
    batch = torch.stack([tokens(0, 2), tokens(1, 2)])
    for step in range(3):
        stack.step(step, batch)
    first._trained[0, 0] = float("nan")
    stack.step(3, batch)
    assert stack.stopped_at == [4, None]
    with pytest.raises(NonFiniteError, match="hold inf or nan"):
        first.exchange(4)
    stack.step(4, batch)
    assert stack.stopped_at == [4, None]
    assert bool(torch.isfinite(second.shared).all())


def test_the_fused_step_is_the_plain_one() -> None:
    decayed = torch.tensor([1.0] * 5 + [0.0] * 3 + [1.0] * 4)
    generator = torch.Generator().manual_seed(0)
    both = [AdamW(3, decayed, Train(weight_decay=0.3)) for _ in range(2)]
    both[1].is_fused = True
    weights = [torch.randn(3, 12, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    for _ in range(4):
        slope = torch.randn(3, 12, generator=generator)
        for adam, own in zip(both, weights, strict=True):
            adam.step(own, slope, [0.1, 0.1, 0.3])
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_the_exchange_may_be_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own weights are copied there and back: the same run."""
    ends = []
    for where in ("cpu", "elsewhere"):
        (setting,) = settings([(1e-3, 0)])
        method = Update(kind="update", name="u", sync_every=2, density=0.05)
        simulation = UpdateSimulation(setting, method)
        monkeypatch.setattr(
            simulation, "setting", Setting(**{**_fields(setting), "exchange_device": where})
        )
        for step in range(6):
            simulation.step(step, tokens(step, 2), 1e-3)
        assert (simulation._own is simulation._trained) == (where == "cpu")
        ends.append(simulation.shared.clone())
    assert torch.equal(*ends)


def _fields(setting: Setting) -> dict[str, Any]:
    return {name: getattr(setting, name) for name in Setting.__dataclass_fields__}


def test_a_campaign_takes_the_best_learning_rate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {
        "question": "Which?",
        "model": SHAPE.model_dump(),
        "train": {**TRAIN.model_dump(), "lr": 1e-4},
        "methods": [method.model_dump(exclude_defaults=True) for method in METHODS],
    }
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    case = {"grid": "grid.json", "workers": 2, "steps": 8, "seeds": 1, "lrs": [1e-4, 1e-2]}
    jobs = [{"case": "c", "methods": ["used"]}, {"case": "c", "methods": []}]
    (tmp_path / "plan.json").write_text(json.dumps({"cases": {"c": case}, "jobs": jobs}))
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 102)) * 60)
    out = tmp_path / "out"
    words = ["--plan", str(tmp_path / "plan.json"), "--text", str(tmp_path / "text.txt")]
    words += ["--start-before-s", "100", "--end-s", "200", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["campaign", *words])
    for _ in range(2):  # the second time everything is there
        assert campaign.main() == 0
        lines = (out / campaign.RUNS).read_text().splitlines()
        runs = [json.loads(line) for line in lines]
        assert [(r["method"], r["train"]["lr"]) for r in runs] == [
            ("dense", 1e-4),
            ("dense", 1e-2),
            ("used", 1e-2),
        ]
    assert "0 jobs were not started" in capsys.readouterr().out


def test_a_job_that_fails_is_tried_in_other_ways(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = {"grid": "grid.json", "workers": 2, "steps": 8, "seeds": 1, "lrs": [1e-4]}
    (tmp_path / "plan.json").write_text(
        json.dumps({"cases": {"c": case}, "jobs": [{"case": "c", "methods": []}]})
    )
    (tmp_path / "grid.json").write_text(json.dumps({"question": "?", "methods": []}))
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 102)) * 60)
    ways: list[int] = []

    def fail(self: campaign.Campaign, batch: Any) -> Any:
        ways.append(batch.way)
        here, there = campaign.multiprocessing.Pipe(duplex=False)
        process = campaign.multiprocessing.get_context("fork").Process(target=there.close)
        process.start()
        there.close()
        return here, process

    monkeypatch.setattr(campaign.Campaign, "_start", fail)
    words = ["--plan", str(tmp_path / "plan.json"), "--text", str(tmp_path / "text.txt")]
    words += ["--start-before-s", "100", "--end-s", "200", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["campaign", *words])
    assert campaign.main() == 0
    assert ways == [0, 1, 2]
    assert capsys.readouterr().out.count("ended without an answer") == 3


def test_dense_bits_of_a_stack_are_counted() -> None:
    own = [DenseSimulation(setting) for setting in settings([(1e-3, 0), (2e-3, 0)])]
    stack = Stack(own)
    batch = torch.stack([tokens(0, 2)] * 2)
    for step in range(4):
        stack.step(step, batch)
    assert [one.received_bits for one in own] == [2 * 32.0 * own[0].setting.gpt.numel] * 2
