"""A user's own script: a plain loop over `ds_gradprune.initialize`, which catches nothing.

plain_main CONFIG.json FOLDER STEPS [--opens] [--watch]

With --opens it makes the process group itself, with torch's own time-out of half an hour.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch


def main(arguments: Sequence[str]) -> int:
    """Train a small model, save after every fourth step, validate once; returns 0."""
    import deepspeed

    import ds_gradprune

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute
    if "--opens" in arguments:
        deepspeed.init_distributed("gloo", timeout=timedelta(minutes=30))
    config = json.loads(Path(arguments[0]).read_text())
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 1))
    engine, *_ = ds_gradprune.initialize(
        model=model, model_parameters=list(model.parameters()), config=config
    )
    engine.gradprune.check_alike({"steps": arguments[2]})
    train(engine, Path(arguments[1]), int(arguments[2]), watches="--watch" in arguments)
    return 0


def train(engine: Any, folder: Path, steps: int, *, watches: bool) -> None:
    """The loop, under `ds_gradprune.watch` or not."""
    import ds_gradprune

    with ds_gradprune.watch(engine) if watches else contextlib.nullcontext():
        for step in range(1, steps + 1):
            generator = torch.Generator().manual_seed(2 * step + torch.distributed.get_rank())
            inputs = torch.randn(4, 64, generator=generator)
            engine.backward(one_loss(engine, inputs))
            engine.step()
            if step % 4 == 0:
                engine.save_checkpoint(str(folder))
        validate(engine)


def one_loss(engine: Any, inputs: torch.Tensor) -> torch.Tensor:
    """The mean square of what the model says, from the row's own sum."""
    loss: torch.Tensor = (engine(inputs) - inputs.sum(1, keepdim=True)).square().mean()
    return loss


def validate(engine: Any) -> None:
    """As scripts do: a mean over all ranks, in their own group."""
    with torch.no_grad():
        engine.eval()
        loss = one_loss(engine, torch.ones(4, 64))
        torch.distributed.all_reduce(loss)
        torch.distributed.barrier()
