"""A method at work on one rank: the same model and AdamW, under DeepSpeed or under DDP.

Times of a step, in seconds, add up to its wall clock: compute (forward, backward, optimizer), codec
(what compression costs on this rank) and comm (exposed communication: what the step waited for).
How they are told apart:

- DeepSpeed's exchange comes after the backward pass and blocks, so the collectives are timed. So
  are those of 1-bit Adam and 0/1 Adam.
- Ours measures itself.
- DDP's exchange overlaps with the backward pass. So the same step is timed in a group of one, where
  nothing is exchanged, and without DDP, where nothing is compressed; the differences are codec and
  exposed communication. The medians of both are taken right before the steps they are used for.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from labs.race.job import Recipe
from labs.race.methods import Method
from labs.race.onebit import GlooWire
from labs.race.onebit_adam import Kind, OneBitAdam, Rules, ZeroOneAdam

CALIBRATION_STEPS = 4
"""Local steps behind the medians; as many before them, uncounted, the first time."""

ONE_BUCKET_MB = 4096
"""Larger than any model that is trained here."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step on one rank.

    Attributes:
        loss: training loss of this rank.
        wall_s: whole step, seconds.
        compute_s, codec_s, comm_s: its parts, see the module.
        payload_bytes: what the method itself says it sent; None: it does not say.
        density: share of elements sent; None: nothing is pruned.
        kind: "usual"; or "dense", not compressed, at first or in between; or "silent", without any
            exchange.
    """

    loss: float
    wall_s: float
    compute_s: float
    codec_s: float
    comm_s: float
    payload_bytes: int | None = None
    density: float | None = None
    kind: Kind = "usual"


class Engine(Protocol):
    """What the worker drives."""

    module: torch.nn.Module

    def calibrate(self, tokens: torch.Tensor) -> None:
        """Measure what is needed to tell the times of the coming steps apart. Local."""
        ...

    def step(self, tokens: torch.Tensor, number: int) -> StepTimes:
        """Train one step, counted from 1. Collective."""
        ...


def open_engine(method: Method, model: torch.nn.Module, recipe: Recipe) -> Engine:
    """The engine of a method. Collective: all ranks."""
    if method.side == "ddp":
        return DdpEngine(method, model, recipe)
    if method.side == "simulated":
        return OneBitEngine(method, model, recipe)
    return DeepSpeedEngine(method, model, recipe)


def _optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(),
        lr=recipe.lr,
        betas=(0.9, recipe.beta2),
        weight_decay=recipe.weight_decay,
    )


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class DeepSpeedEngine:
    """DeepSpeed, alone or with pruned gradients or updates."""

    def __init__(self, method: Method, model: torch.nn.Module, recipe: Recipe) -> None:
        import deepspeed

        import ds_gradprune

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile an op
        deepspeed.init_distributed("gloo", verbose=False)
        self._method, self._recipe = method, recipe
        self._optimizer = _optimizer(model, recipe)
        self._engine = ds_gradprune.initialize(
            model=model, optimizer=self._optimizer, config=ds_config(method, recipe)
        )[0]
        self.module = self._engine.module
        self._waited_s = 0.0
        if not method.prunes:
            self._time_collectives()

    def calibrate(self, tokens: torch.Tensor) -> None:
        """Nothing: every step's times are measured."""

    def step(self, tokens: torch.Tensor, number: int) -> StepTimes:
        """See `Engine`. Collective."""
        _set_lr(self._optimizer, self._recipe.lr_at(number))
        self._waited_s = 0.0
        start_s = time.perf_counter()
        loss = self._engine(input_ids=tokens, labels=tokens).loss
        self._engine.backward(loss)
        self._engine.step()
        wall_s = time.perf_counter() - start_s
        if not self._method.prunes:
            comm_s = self._waited_s
            return StepTimes(float(loss.detach()), wall_s, wall_s - comm_s, 0.0, comm_s)
        report = self._engine.gradprune.report
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
        if method.adaptive:
            block["step_time_budget_s"] = recipe.budget_s
        else:
            block["density"] = dict.fromkeys(("initial", "min", "max"), method.density)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.micro_batch,
        "gradient_clipping": recipe.clip_norm,
        "zero_optimization": {"stage": recipe.zero_stage},
        "steps_per_print": None,
        "gradient_pruning": block,
    }
    if method.wire_dtype != "fp32":
        config["communication_data_type"] = method.wire_dtype
    return config


class DdpEngine:
    """torch's DistributedDataParallel, plain or with one of its communication hooks."""

    def __init__(self, method: Method, model: torch.nn.Module, recipe: Recipe) -> None:
        self._method, self._recipe = method, recipe
        self._own_group = _group_of_one()
        # Local twins, before the hook: one without DDP, one with it in a group of one.
        self._plain = _Loop(copy.deepcopy(model), recipe)
        self._alone = _Loop(self._wrapped(copy.deepcopy(model), self._own_group, 2), recipe)
        # torch asks for at least two dense steps before PowerSGD.
        self._dense_steps = max(2, recipe.dense_steps) if method.rank is not None else 0
        wrapped = self._wrapped(model, dist.group.WORLD, self._dense_steps)
        self._loop = _Loop(wrapped, recipe)
        self.module = model
        self._compute_s = self._codec_s = 0.0
        self._is_warm = False

    def calibrate(self, tokens: torch.Tensor) -> None:
        """Time local steps, with and without compression, in turn. Local."""
        if not self._is_warm:
            self._local_steps(tokens)
            self._is_warm = True
        plain, alone = self._local_steps(tokens)
        self._compute_s = statistics.median(plain)
        self._codec_s = max(0.0, statistics.median(alone) - self._compute_s)

    def step(self, tokens: torch.Tensor, number: int) -> StepTimes:
        """See `Engine`. Collective."""
        loss, wall_s = self._loop.step(tokens, number)
        is_dense = number <= self._dense_steps
        codec_s = 0.0 if is_dense else self._codec_s
        comm_s = max(0.0, wall_s - self._compute_s - codec_s)
        kind: Kind = "dense" if is_dense else "usual"
        return StepTimes(loss, wall_s, wall_s - codec_s - comm_s, codec_s, comm_s, kind=kind)

    def _local_steps(self, tokens: torch.Tensor) -> tuple[list[float], list[float]]:
        plain, alone = [], []
        for number in range(1, CALIBRATION_STEPS + 1):
            plain.append(self._plain.step(tokens, number)[1])
            alone.append(self._alone.step(tokens, number)[1])
        return plain, alone

    def _wrapped(self, model: torch.nn.Module, group: Any, dense_steps: int) -> torch.nn.Module:
        # PowerSGD exchanges twice per bucket, the second time when the first is back. Over gloo two
        # buckets' exchanges would meet in another order on another rank, and fail: one bucket.
        wrapped = torch.nn.parallel.DistributedDataParallel(
            model,
            process_group=group,
            bucket_cap_mb=None if self._method.rank is None else ONE_BUCKET_MB,
            gradient_as_bucket_view=True,
        )
        _register_hook(wrapped, self._method, group, dense_steps)
        return wrapped


class OneBitEngine:
    """1-bit Adam or 0/1 Adam, simulated."""

    def __init__(self, method: Method, model: torch.nn.Module, recipe: Recipe) -> None:
        self.module, self._recipe, self._wire = model, recipe, GlooWire()
        rules = Rules(0.9, recipe.beta2, 1e-8, recipe.weight_decay, recipe.clip_norm)
        self._optimizer: OneBitAdam | ZeroOneAdam
        if method.interval is None:
            self._optimizer = OneBitAdam(model.parameters(), self._wire, rules, recipe.freeze_step)
        else:
            policy = recipe.policy(method.interval)
            self._optimizer = ZeroOneAdam(model.parameters(), self._wire, rules, policy)

    def calibrate(self, tokens: torch.Tensor) -> None:
        """Nothing: every step's times are measured."""

    def step(self, tokens: torch.Tensor, number: int) -> StepTimes:
        """See `Engine`. Collective."""
        codec_s, waited_s = self._optimizer.codec_s, self._wire.waited_s
        sent_bytes = self._wire.sent_bytes
        start_s = time.perf_counter()
        loss = self.module(input_ids=tokens, labels=tokens).loss
        loss.backward()
        kind = self._optimizer.step(self._recipe.lr_at(number))
        self.module.zero_grad()
        wall_s = time.perf_counter() - start_s
        codec_s = self._optimizer.codec_s - codec_s
        comm_s = self._wire.waited_s - waited_s
        return StepTimes(
            loss=float(loss.detach()),
            wall_s=wall_s,
            compute_s=wall_s - codec_s - comm_s,
            codec_s=codec_s,
            comm_s=comm_s,
            payload_bytes=round(self._wire.sent_bytes - sent_bytes),
            kind=kind,
        )


class _Loop:
    """Forward, backward, clip, step."""

    def __init__(self, module: torch.nn.Module, recipe: Recipe) -> None:
        self._module, self._recipe = module, recipe
        self._optimizer = _optimizer(module, recipe)

    def step(self, tokens: torch.Tensor, number: int) -> tuple[float, float]:
        """The loss and the seconds."""
        _set_lr(self._optimizer, self._recipe.lr_at(number))
        start_s = time.perf_counter()
        loss = self._module(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._module.parameters(), self._recipe.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach()), time.perf_counter() - start_s


def _register_hook(wrapped: Any, method: Method, group: Any, dense_steps: int) -> None:
    """torch/distributed/algorithms/ddp_comm_hooks, torch 2.13."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if method.rank is not None:
        state = powerSGD_hook.PowerSGDState(
            process_group=group,
            matrix_approximation_rank=method.rank,
            start_powerSGD_iter=dense_steps,
            use_error_feedback=True,
            warm_start=True,
        )
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif method.wire_dtype == "fp16":
        wrapped.register_comm_hook(group, default_hooks.fp16_compress_hook)
    elif method.wire_dtype == "bf16":
        # By its name torch refuses the hook where NCCL is not; gloo sums bf16 just as well.
        def hook(group: Any, bucket: Any) -> Any:
            return default_hooks.bf16_compress_hook(group, bucket)

        hook.__annotations__ = {}  # torch would want its own types here
        wrapped.register_comm_hook(group, hook)


def _group_of_one() -> Any:
    """This rank alone. Collective: every rank takes part in making every group."""
    groups = [dist.new_group([rank], backend="gloo") for rank in range(dist.get_world_size())]
    return groups[dist.get_rank()]
