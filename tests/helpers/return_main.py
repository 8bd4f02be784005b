"""A script of one's own whose last island is lost, and comes back into the run that goes on."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from ds_gradprune.errors import GradPruneError
from tests.helpers.ds_main import TinyLM, batch, ds_config

BLOCK = {
    "min_islands": 1,
    "warmup_steps": 3,
    "ramp_steps": 0,
    "window_size": 4,
    "timeout_s": 10.0,
    "verify_every_steps": 1,
    "density": {"initial": 0.05, "min": 0.05, "max": 0.05},
}
AT, STEPS = 5, 6
"""The last rank is lost after step 5; so many steps its island makes when it is back."""


def train(block: dict[str, Any], ranks: int = 1, **options: Any) -> dict[str, Any]:
    """Train; each rank of the last island forks its first life, and then comes back.

    Args:
        block: beside `BLOCK`.
        ranks: of an island.
        options: of the engine.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_lost = rank >= size - ranks
    block = block | {"island": {"ranks": ranks}}
    if is_lost:
        reader, writer = os.pipe()
        if not os.fork():
            os.close(reader)
            _first_life(block, options)
        os.close(writer)
        os.read(reader, 1)  # until the first life has ended
    return _live(block, options, comes_back=is_lost)


def _first_life(block: dict[str, Any], options: dict[str, Any]) -> None:
    engine = _engine(block, options)
    try:
        for step in range(2 * AT):
            if step == AT and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
                break
            _step(engine, step)
    except GradPruneError as exc:  # the other rank of its island is gone
        print(exc)
    finally:
        os._exit(0)


def _live(block: dict[str, Any], options: dict[str, Any], *, comes_back: bool) -> dict[str, Any]:
    engine = _engine(block, options)
    handle = engine.gradprune
    handle.tells = lambda: {"seed": 3}
    told = {"joined": handle.join() if comes_back else None, "is_newcomer": comes_back}
    told["first"] = engine.global_steps
    senders, crcs, end = {}, {}, None
    step = engine.global_steps
    while end is None or step < end:
        _step(engine, step)
        step += 1
        senders[step] = len(handle.crew.islands)
        crcs[step] = handle.parameters_crc()
        is_whole = senders[step] == handle.groups.num_islands
        if end is None and is_whole and (comes_back or len({*senders.values()}) > 1):
            end = step + STEPS
        if not is_whole:
            time.sleep(0.05)
    told |= {"senders": senders, "crcs": crcs, "rate": engine.get_lr()}
    states = engine.basic_optimizer.state.values()
    told["steps_of_adam"] = sorted({int(state["step"]) for state in states if "step" in state})
    handle.detach()
    return told


def _engine(block: dict[str, Any], options: dict[str, Any]) -> Any:
    import deepspeed

    import ds_gradprune

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(0)
    model = TinyLM()
    config = ds_config(BLOCK | block, **options)
    return ds_gradprune.initialize(
        model=model, model_parameters=list(model.parameters()), config=config
    )[0]


def _step(engine: Any, step: int) -> None:
    for micro_step in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(batch(step, micro_step, int(os.environ["RANK"]))))
        engine.step()
