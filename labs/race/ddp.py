"""torch's DistributedDataParallel at work on one rank.

Its exchange overlaps with the backward pass. So the same step is timed in a group of one, where
nothing is exchanged, and without DDP, where nothing is compressed; the differences are codec and
exposed communication. The medians of both are taken right before the steps they are used for.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from labs.race.engine import StepTimes, adamw, set_lr
from labs.race.job import Recipe
from labs.race.methods import Method
from labs.race.onebit_adam import Kind

CALIBRATION_STEPS = 4
"""Local steps behind the medians; as many before them, uncounted, the first time."""

ONE_BUCKET_MB = 4096
"""Larger than any model that is trained here."""


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


class _Loop:
    """Forward, backward, clip, step."""

    def __init__(self, module: torch.nn.Module, recipe: Recipe) -> None:
        self._module, self._recipe = module, recipe
        self._optimizer = adamw(module, recipe)

    def step(self, tokens: torch.Tensor, number: int) -> tuple[float, float]:
        """The loss and the seconds."""
        set_lr(self._optimizer, self._recipe.lr_at(number))
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
