"""One rank that starts from each shipped configuration, for tests/test_ds_configs.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.ds_main import TinyLM, run_steps, start_deepspeed


def start_from(paths: list[str]) -> dict[str, Any]:
    """Initialise an engine from each file and train one step with it."""
    start_deepspeed()
    import ds_gradprune

    answers: dict[str, Any] = {}
    for path in paths:
        model = TinyLM()
        engine = ds_gradprune.initialize(
            model=model, model_parameters=list(model.parameters()), config=path
        )[0]
        trace = run_steps(engine, 1, 1)
        answers[Path(path).name] = {
            "steps": engine.global_steps,
            "losses": trace["losses"][0],
            "idle": engine.gradprune.idle,
            "crc": trace["crcs"][0],
        }
        ds_gradprune.detach(engine)
    return answers
