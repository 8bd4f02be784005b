"""What is read of an engine before its first step, from a small stand-in for one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ds_gradprune.config import load_block
from ds_gradprune.deepspeed.facts import facts_before, facts_of, tell_changes


class Engine:
    """The part of a DeepSpeed engine that `facts_of` reads."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        self.module: Any = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
        self.basic_optimizer = torch.optim.AdamW(
            [{"params": [p], "lr": settings.get("lr", 0.1)} for p in self.module.parameters()]
        )
        self.lr_scheduler = settings.get("lr_scheduler")
        self._settings = settings

    def __getattr__(self, name: str) -> Any:
        defaults = {
            "bfloat16_enabled": False,
            "fp16_enabled": False,
            "torch_autocast_enabled": False,
            "torch_autocast_dtype": torch.bfloat16,
            "zero_optimization_stage": 2,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
        }
        return lambda: self._settings.get(name, defaults[name])


def facts(block: dict[str, Any] | None = None, **settings: Any) -> Any:
    return facts_of(Engine(**settings), load_block({"gradient_pruning": block or {}}))


def test_versions_and_settings_are_told() -> None:
    values = facts().values
    assert {"ds_gradprune", "wire format", "deepspeed", "torch", "numpy", "python"} <= {*values}
    assert values["zero_optimization.stage"] == "2"
    assert values["precision"] == "fp32"
    assert values["gradient_clipping"] == "1"
    assert values["lr_scheduler"] == "NoneType"
    assert values["optimizer"] == "AdamW"
    assert values["optimizer.param_groups[3].betas"] == "(0.9, 0.999)"
    assert values["gradient_pruning.density.max"] == "0.25"
    assert values["gradient_pruning.island.ranks"] == "null"


def test_every_parameter_is_a_line_with_shape_type_and_whether_it_is_trained() -> None:
    engine = Engine()
    engine.module[1].weight.requires_grad_(False)
    engine.module[0].weight.data = engine.module[0].weight.data[:0]
    engine.module[0].weight.ds_shape = torch.Size((2, 3))
    lists = facts_of(engine, load_block({"gradient_pruning": {}})).lists
    assert lists["parameter"] == [
        "0.weight float32 (2, 3) trained",
        "0.bias float32 (2,) trained",
        "1.weight float32 (2,) frozen",
        "1.bias float32 (2,) trained",
    ]


def test_models_are_compared_before_an_engine_waits_for_them() -> None:
    config = load_block({"gradient_pruning": {}})
    one = facts_before(config, torch.nn.Linear(3, 2), None)
    assert one.values["optimizer"] == "NoneType"
    assert one.values["gradient_pruning.prune"] == "update"
    assert one.lists["parameter"][0] == "weight float32 (2, 3) trained"
    assert one.digest() == facts_before(config, torch.nn.Linear(3, 2), None).digest()
    assert one.digest() != facts_before(config, torch.nn.Linear(3, 3), None).digest()


def test_where_the_log_lies_may_differ() -> None:
    assert facts({"log_path": "a"}).digest() == facts({}).digest()


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"lr": 0.2}, "optimizer.param_groups[0].lr"),
        ({"gradient_clipping": 0.5}, "gradient_clipping"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"bfloat16_enabled": True}, "precision"),
        ({"fp16_enabled": True}, "precision"),
        ({"torch_autocast_enabled": True}, "precision"),
        ({"zero_optimization_stage": 3}, "zero_optimization.stage"),
        ({"block": {"throttle": {"schedule": [{"rate_mbit": 5}]}}},
         "gradient_pruning.throttle.schedule[0].rate_mbit"),
    ],
)  # fmt: skip
def test_what_would_train_otherwise_differs(changed: dict[str, Any], name: str) -> None:
    ours, other = facts(), facts(**changed)
    assert ours.digest() != other.digest()
    assert ours.values.get(name) != other.values[name]


@pytest.mark.parametrize("lr", [0.1, np.float64(0.1), torch.tensor(0.1, dtype=torch.float64)])
def test_a_number_is_the_same_in_whatever_type(lr: Any) -> None:
    assert facts(lr=lr).values["optimizer.param_groups[0].lr"] == "0.1"


def test_what_is_no_number_is_told_by_its_type() -> None:
    engine = Engine()
    engine.basic_optimizer.param_groups[0]["norm"] = torch.zeros(3)
    engine.basic_optimizer.param_groups[0]["shape"] = {"b": 1, "a": [None, True, float("inf")]}
    values = facts_of(engine, load_block({"gradient_pruning": {}})).values
    assert values["optimizer.param_groups[0].norm"] == "a Tensor"
    assert values["optimizer.param_groups[0].shape"] == "a: (null, true, inf), b: 1"


def test_a_schedule_of_other_numbers_differs() -> None:
    optimizer = Engine().basic_optimizer
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, size) for size in (5, 6)]
    one, other = (facts(lr_scheduler=schedule).values for schedule in schedules)
    assert one["lr_scheduler.step_size"] == "5"
    assert {name for name in one if one[name] != other[name]} == {"lr_scheduler.step_size"}


def test_what_has_changed_since_a_checkpoint_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Another density, interval or learning rate was accepted without a word."""
    before = facts({"sync_every": 2}, lr=0.2).values
    tell_changes(before, before)
    tell_changes(None, before)
    assert not caplog.messages
    tell_changes(before, facts({"sync_every": 4}).values)
    [message] = caplog.messages
    assert "gradient_pruning.sync_every was 2, is 4; " in message
    assert "optimizer.param_groups[0].lr was 0.2, is 0.1; " in message
    assert "learning rate and other numbers of the optimizer are the checkpoint's" in message
