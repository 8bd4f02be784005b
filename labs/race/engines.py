"""A method at work on one rank: the same model and AdamW, under DeepSpeed or what competes with it.

DeepSpeed's exchange comes after the backward pass and blocks, so its collectives are timed. Ours
measures itself. The others: ddp.py, simulated.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch

from labs.race.ddp import DdpEngine
from labs.race.engine import Engine, StepTimes, adamw, set_lr
from labs.race.job import Recipe
from labs.race.methods import Method
from labs.race.simulated import OneBitEngine


def open_engine(method: Method, model: torch.nn.Module, recipe: Recipe) -> Engine:
    """The engine of a method. Collective: all ranks."""
    if method.side == "ddp":
        return DdpEngine(method, model, recipe)
    if method.side == "simulated":
        return OneBitEngine(method, model, recipe)
    return DeepSpeedEngine(method, model, recipe)


class DeepSpeedEngine:
    """DeepSpeed, alone or with pruned gradients or updates."""

    def __init__(self, method: Method, model: torch.nn.Module, recipe: Recipe) -> None:
        import deepspeed

        import ds_gradprune

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile an op
        deepspeed.init_distributed("gloo", verbose=False)
        self._method, self._recipe = method, recipe
        self._optimizer = adamw(model, recipe)
        self._engine = ds_gradprune.initialize(
            model=model, optimizer=self._optimizer, config=ds_config(method, recipe)
        )[0]
        self.module = self._engine.module
        self._waited_s = 0.0
        self._report: Any = None
        if not method.prunes and recipe.times_waits:
            self._time_collectives()

    def calibrate(self, tokens: torch.Tensor) -> None:
        """Nothing: every step's times are measured."""

    def step(self, tokens: torch.Tensor, number: int) -> StepTimes:
        """See `Engine`. Collective."""
        set_lr(self._optimizer, self._recipe.lr_at(number))
        self._waited_s = 0.0
        start_s = time.perf_counter()
        loss = self._engine(input_ids=tokens, labels=tokens).loss
        self._engine.backward(loss)
        self._engine.step()
        wall_s = time.perf_counter() - start_s
        if not self._method.prunes:
            comm_s = self._waited_s
            return StepTimes(float(loss.detach()), wall_s, wall_s - comm_s, 0.0, comm_s)
        report, before = self._engine.gradprune.report, self._report
        self._report = report
        if report is before:  # no exchange ended in this step
            return StepTimes(
                float(loss.detach()), wall_s, wall_s, 0.0, 0.0, payload_bytes=0, kind="silent"
            )
        return StepTimes(
            loss=float(loss.detach()),
            wall_s=wall_s,
            compute_s=wall_s - report.codec_time_s - report.comm_time_s,
            codec_s=report.codec_time_s,
            comm_s=report.comm_time_s,
            payload_bytes=report.wire_bytes,
            density=report.density,
            kind="dense" if number <= self._recipe.dense_steps else "usual",
        )

    def _time_collectives(self) -> None:
        """Add up the time inside DeepSpeed's collectives."""
        from deepspeed.comm import comm

        backend: Any = comm.cdb
        for name in ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            setattr(backend, name, self._timed(getattr(backend, name)))

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            result = collective(*args, **kwargs)
            if result is not None and hasattr(result, "wait"):
                result.wait()
            self._waited_s += time.perf_counter() - start_s
            return result

        return timed


def ds_config(method: Method, recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's configuration for a method. Pure."""
    block: dict[str, Any] = {"enabled": False}
    if method.prunes:
        block = {
            "prune": method.prune,
            "warmup_steps": recipe.dense_steps,
            "ramp_steps": recipe.dense_steps if method.adaptive else 0,
            "window_size": max(8, min(128, recipe.steps // 4)),
        }
        if method.prune == "update":
            block["island"] = {"ranks": recipe.ranks_per_host}
        if isinstance(method.sync_every, int):
            block |= {"value_bits": 2, "warmup": "unpruned", "overlap": "auto"}
        block |= json.loads(recipe.block or "{}")
        if method.sync_every is not None:  # it is in the method's name, so no block changes it
            block["sync_every"] = method.sync_every
        if method.hides:
            block["overlap"] = "auto"
        if method.adaptive:
            block["step_time_budget_s"] = recipe.budget_s
        else:
            block["density"] = dict.fromkeys(("initial", "min", "max"), method.density)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.micro_batch,
        "gradient_clipping": recipe.clip_norm,
        "zero_optimization": {"stage": recipe.zero_stage} | json.loads(recipe.zero or "{}"),
        "steps_per_print": None,
        "gradient_pruning": block,
    }
    if method.wire_dtype != "fp32":
        config["communication_data_type"] = method.wire_dtype
    return config
