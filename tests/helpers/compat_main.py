"""One rank: engines of every kind that `compat` has a table for, for tests/deepspeed."""

from __future__ import annotations

from typing import Any

import torch

from ds_gradprune.deepspeed import compat
from ds_gradprune.errors import UnsupportedError
from tests.helpers.ds_main import TinyLM, ds_config, start_deepspeed


def kinds() -> dict[str, dict[str, Any]]:
    """Name -> what it needs in ds_config."""
    offload = {"offload_optimizer": {"device": "cpu"}}
    untested = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    found: dict[str, dict[str, Any]] = {}
    for bf16 in (False, True):
        for stage in (0, 1, 2, 3):
            config = {"zero_optimization": {"stage": stage}, **untested}
            found[f"stage {stage}, {'bf16' if bf16 else 'fp32'}"] = ds_config(
                {}, bf16=bf16, **config
            )
    for stage in (2, 3):
        config = {"zero_optimization": {"stage": stage, **offload}, **untested}
        found[f"stage {stage}, offloaded"] = ds_config({}, **config)
    types = {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}}
    found["stage 1, bf16, accumulated in fp32"] = ds_config({}, bf16=True, **types, **untested)
    return found


def check_all() -> dict[str, tuple[str, str]]:
    """Kind -> class of its optimizer, and what `check` says of it; "" is nothing."""
    deepspeed = start_deepspeed()
    answers = {}
    for name, config in kinds().items():
        torch.manual_seed(0)
        engine = deepspeed.initialize(model=TinyLM(), config=config)[0]
        try:
            compat.check(engine, "update")
            said = ""
        except UnsupportedError as exc:
            said = str(exc)
        answers[name] = (type(engine.optimizer).__name__, said)
        engine.destroy()
    return answers
