"""Single cases of one DeepSpeed rank, for tests/test_integration.py."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_gradprune.errors import GradPruneError
from tests.helpers.ds_main import (
    TinyLM,
    batch,
    crc,
    ds_config,
    make_engine,
    run_steps,
    start_deepspeed,
)

BLOCK = {
    "prune": "gradient",
    "warmup_steps": 1,
    "ramp_steps": 0,
    "density": {"initial": 0.05, "min": 0.05, "max": 0.05},
}


def save_at(block: dict[str, Any], folder: str, at: list[int], last: int) -> dict[str, Any]:
    """An unbroken run that leaves checkpoints; every step draws random numbers."""
    engine = make_engine(block, "attach")
    draws: list[float] = []

    def on_step(step: int) -> None:
        draws.append(float(torch.rand(1)))
        if step in at:
            engine.save_checkpoint(folder, tag=f"step{step}")

    return run_steps(engine, 1, last, on_step) | {"random": draws}


def resume_at(block: dict[str, Any], folder: str, at: int, last: int) -> dict[str, Any]:
    """A fresh process continues from the checkpoint; its clock starts anywhere."""
    engine = make_engine(block, "attach")
    engine.load_checkpoint(folder, tag=f"step{at}")
    draws: list[float] = []
    trace = run_steps(engine, at + 1, last, lambda step: draws.append(float(torch.rand(1))))
    return trace | {"random": draws}


def broken_checkpoints(folder: str) -> list[Any]:
    """Each kind of broken checkpoint is refused alike on both ranks, before anything changes."""
    engine = make_engine(BLOCK, "attach")
    run_steps(engine, 1, 3)
    engine.save_checkpoint(folder, tag="good")
    run_steps(engine, 4, 5)
    before = crc(engine)
    answers: list[Any] = []
    for kind in ("missing", "damaged", "foreign"):
        if dist.get_rank() == 0:
            _break(Path(folder), kind)
        dist.barrier()
        try:
            engine.load_checkpoint(folder, tag=kind)
        except GradPruneError as exc:
            answers.append(str(exc))
    return [*answers, crc(engine) == before and engine.global_steps == 5]


def _break(folder: Path, kind: str) -> None:
    shutil.copytree(folder / "good", folder / kind)
    victim = folder / kind / "gradient_pruning_island_00001_shard_00000.pt"
    if kind == "missing":
        victim.unlink()
    elif kind == "damaged":
        victim.write_bytes(victim.read_bytes()[:-100])
    else:
        for rank, file in enumerate(sorted((folder / kind).glob("gradient_pruning_*"))):
            file.rename(file.with_name(f"gradient_pruning_rank_{rank:05d}_of_00002.pt"))


def plain_checkpoint(folder: str) -> dict[str, Any]:
    """Saved without us, loaded with us."""
    engine = make_engine(None, "plain")
    run_steps(engine, 1, 3)
    engine.save_checkpoint(folder, tag="plain")
    saved = crc(engine)
    import deepspeed

    from ds_gradprune.deepspeed.attach import attach

    torch.manual_seed(1)
    other = deepspeed.initialize(model=TinyLM(), config=ds_config(BLOCK))[0]
    attach(other)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ds_gradprune").addHandler(handler)
    other.load_checkpoint(folder, tag="plain")
    return {
        "crc_saved": saved,
        "crc_loaded": crc(other),
        "step": other.gradprune.session.step,
        "warning": " ".join(messages),
    }


def detach_leaves_nothing() -> list[str]:
    """Names of the engine's attributes that differ after attach and detach."""
    from deepspeed.comm import comm

    import ds_gradprune

    engine = make_engine(BLOCK, "plain")
    backend, hooks = comm.cdb, len(engine._forward_pre_hooks)
    before = dict(engine.__dict__)
    ds_gradprune.attach(engine)
    run_steps(engine, 1, 3)
    assert comm.cdb is not backend
    ds_gradprune.detach(engine)
    ds_gradprune.detach(engine)
    names = ["backward", "step", "allreduce_bucket", "buffered_allreduce_fallback"]
    names += ["save_checkpoint", "load_checkpoint"]
    left = [name for name in names if name in engine.__dict__]
    left += [name for name in before if name not in engine.__dict__]
    left += [] if comm.cdb is backend else ["cdb"]
    left += [] if len(engine._forward_pre_hooks) == hooks else ["forward hook"]
    run_steps(engine, 4, 5)
    return left


def other_collectives() -> dict[str, Any]:
    """What is not a gradient bucket is none of our business, and is still logged."""
    import deepspeed.comm as ds_dist
    from deepspeed.utils import comms_logging  # noqa: F401 - the logger under test lives there

    engine = make_engine(
        BLOCK, "attach", comms_logger={"enabled": True, "prof_all": True, "verbose": False}
    )
    run_steps(engine, 1, 3)
    one = torch.tensor([1.0 + dist.get_rank()])
    total, highest = one.clone(), one.clone()
    ds_dist.all_reduce(total)
    ds_dist.all_reduce(highest, op=ds_dist.ReduceOp.MAX)
    rows = [torch.zeros(1), torch.zeros(1)]
    ds_dist.all_gather(rows, one)
    return {
        "sum": float(total),
        "max": float(highest),
        "gathered": [float(row) for row in rows],
        "op": any("all_reduce" in name for name in ds_dist.comms_logger.comms_dict),
    }


def nan_gradient() -> list[dict[str, Any]]:
    """Rank 1's loss is nan: in the dense warm-up, and in a pruned step."""
    return [_nan_gradient(1), _nan_gradient(4)]


def _nan_gradient(step: int) -> dict[str, Any]:
    engine = make_engine(BLOCK, "attach")
    run_steps(engine, 1, step - 1)
    store = engine.gradprune.pruning.residuals
    before, crc = store.norm(), engine.gradprune.parameters_crc()

    def poisoned() -> None:
        loss = engine(batch(step, 0, dist.get_rank()))
        engine.backward(loss * float("nan") if dist.get_rank() else loss)
        engine.step()

    return {
        "message": _message(poisoned),
        "density": engine.gradprune.loop.decision.density,
        "residual_same": store.norm() == before,
        "weights_same": engine.gradprune.parameters_crc() == crc,
    }


def perturbed_parameters() -> str:
    """One bit differs on rank 1; the next hash finds it."""
    engine = make_engine(BLOCK | {"verify_every_steps": 2}, "attach")
    run_steps(engine, 1, 2)
    if dist.get_rank() == 1:
        with torch.no_grad():
            engine.module.norm.bias[0] += 1e-6
    try:
        run_steps(engine, 3, 8)
    except GradPruneError as exc:
        return str(exc)
    return "not noticed"


def different_blocks() -> str:
    """The two hosts were given different files."""
    try:
        make_engine(BLOCK | {"warmup_steps": 1 + int(os.environ["RANK"])}, "attach")
    except GradPruneError as exc:
        return str(exc)
    return "not noticed"


def refusals() -> dict[str, str]:
    """Each thing we do not support, and what is said about it."""
    deepspeed = start_deepspeed()
    import ds_gradprune

    def attempt(**changes: Any) -> str:
        model = changes.pop("model", None) or TinyLM()
        block = changes.pop("block", BLOCK)
        engine = deepspeed.initialize(model=model, config=ds_config(block, **changes))[0]
        return _message(lambda: ds_gradprune.attach(engine))

    sparse = TinyLM()
    sparse.extra = torch.nn.Embedding(10, 4, sparse=True)
    answers = {
        "stage": attempt(zero_optimization={"stage": 3}, zero_allow_untested_optimizer=True),
        "sparse": attempt(model=sparse),
        "missing": attempt(block=None),
        "misspelt": attempt(block=None, gradient_prunning={}),
    }
    engine = deepspeed.initialize(model=TinyLM(), config=ds_config(BLOCK))[0]
    ds_gradprune.attach(engine)
    answers["twice"] = _message(lambda: ds_gradprune.attach(engine))
    engine = deepspeed.initialize(model=TinyLM(), config=ds_config(BLOCK))[0]
    type(engine).allreduce_bucket = lambda self, tensors: None
    answers["version"] = _message(lambda: ds_gradprune.attach(engine))
    return answers


def _message(action: Any) -> str:
    try:
        action()
    except GradPruneError as exc:
        return str(exc)
    return "accepted"


def csv_monitor(folder: str) -> list[str]:
    """Names of the series that DeepSpeed's csv monitor wrote."""
    engine = make_engine(
        BLOCK,
        "attach",
        csv_monitor={"enabled": True, "output_path": folder, "job_name": "job"},
    )
    run_steps(engine, 1, 3)
    dist.barrier()
    files = [path.stem for path in Path(folder).rglob("*.csv")]
    return [name.removeprefix("Train_Samples_") for name in files]
