"""Gradient mode at ZeRO stages 1 and 2 (deepspeed 0.19.8, runtime/zero/stage_1_and_2.py).

DeepSpeed gathers gradients in buckets and reduces a bucket when it is full: stage 2, and stage 1
with `overlap_comm`, during backward; stage 1 otherwise when backward is over. All its ways end in
one collective for each call of two methods of the optimizer, and that collective is ours:

- `gradient_reduction_w_predivide`: one all-reduce of a bucket (`reduce_scatter` off);
- `allreduce_bucket`: one all-reduce or reduce of what a bucket holds for some ranks.

Its divisions, casts and copies into the partitions stay in force around them. Every rank gets every
sum, and keeps of it what DeepSpeed lets it keep.

A *round* is the reductions of one backward: at stage 2 one for every micro-step, at stage 1 one for
every step. Every reduction sends a message, and an announcement before it that tells who is
concerned, so ranks that reduce different parameters are found before their payloads meet. The
density holds for the whole step, and residuals are committed when the optimizer has stepped. The
loss is known in the round at the accumulation boundary, and what was announced there last is what
the law decides from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import google_crc32c
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from ds_gradprune.deepspeed.gradient_handle import GradientHandle, all_finite
from ds_gradprune.deepspeed.hooks import Hooks
from ds_gradprune.deepspeed.places import Place, Places, gradient_of, place_of
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.inside import Gradient
from ds_gradprune.wire.channel import Announcement
from ds_gradprune.wire.traffic import all_gather_bytes

logger = logging.getLogger(__name__)

GATHERED = (
    'prune = "gradient" at ZeRO stage {stage} prunes gradients only: after every step each rank '
    "also sends {gather:.3f} MB of whole parameters over the network, whatever the density.{rounds}"
    ' prune = "update" sends no whole parameters.'
)
ROUNDS = (
    " Stage 2 exchanges gradients in each of the {count} micro-steps of a step: stage 1 exchanges "
    "them once."
)


class ZeroGradientHandle(GradientHandle):
    """`engine.gradprune` of an engine whose `DeepSpeedZeroOptimizer` reduces gradients."""

    def _hook(self) -> None:
        self._told: list[Announcement] = []
        self._in_round = self._is_closed = False
        self._has_owners = self.config.exchange_of(self.channel.world_size) == "owner_reduce"
        self._loss: float | None = None
        self._optimizer_hooks = Hooks(self.engine.optimizer, "engine.optimizer")
        for name, hook in (
            ("reduce_ipg_grads", self._reduce_buckets),
            ("gradient_reduction_w_predivide", self._reduce_whole),
            ("allreduce_bucket", self._reduce_slices),
            ("overlapping_partition_gradients_reduce_epilogue", self._end_round),
        ):
            self._optimizer_hooks.replace(name, hook)

    def _before_detach(self) -> None:
        self._optimizer_hooks.check()
        super()._before_detach()
        self._optimizer_hooks.remove()

    # ---- the reductions of a round -------------------------------------------------------------

    def _reduce_buckets(self, original: Callable[..., Any], comm_dtype: Any = None) -> Any:
        """Note whose gradients lie where before DeepSpeed reduces and forgets them."""
        self._places = Places(self._lay_out(comm_dtype))
        try:
            return original(comm_dtype=comm_dtype)
        finally:
            self._places = Places()

    def _lay_out(self, comm_dtype: Any) -> Iterator[Place]:
        optimizer = self.engine.optimizer
        for dtype, bucket in optimizer.ipg_buckets.items():
            if comm_dtype not in (None, dtype):
                continue
            for grad, (_, _, number) in zip(bucket.grads, bucket.params, strict=True):
                parameter = optimizer.param_dict[number]
                name = optimizer.param_names[parameter]
                yield place_of(grad, gradient_of(name, parameter, self.config.min_numel))

    def _reduce_whole(
        self, original: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        return self._reduce_once(original, [tensor], tensor, *args, **kwargs)

    def _reduce_slices(
        self, original: Callable[..., Any], bucket: list[torch.Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        return self._reduce_once(original, bucket, bucket, *args, **kwargs)

    def _reduce_once(
        self, original: Callable[..., Any], tensors: Sequence[torch.Tensor], *args: Any, **kw: Any
    ) -> Any:
        """Let DeepSpeed reduce these tensors together, with its collective replaced by ours."""
        if not any(tensor.numel() for tensor in tensors):
            return original(*args, **kw)
        gradients = self._places.owners(tensors)

        def reduce(flat: torch.Tensor) -> None:
            self._tell(gradients, flat)
            self._reduce(flat, gradients)

        with self._backend.gradient_bucket(reduce):
            return original(*args, **kw)

    def _tell(self, gradients: tuple[Gradient, ...], vector: torch.Tensor | None) -> None:
        """Announce a reduction; None: nothing is reduced, only the loss is told. Collective."""
        with self.loop.stopwatch.phase("codec"):
            if not self._told:
                self.channel.advance(self.loop.exchange_step)
            if not self._in_round:
                self._in_round = True
                if not (self._told and self._has_owners):
                    self.pruning.begin()  # owners keep a residual for every number in a step
                self._is_closed = vector is None or self.engine.is_gradient_accumulation_boundary()
                self._loss = self.losses.so_far() if self._is_closed else None
            self.loop.note_weights(google_crc32c.value(repr(gradients).encode()))
            bad = vector is not None and not all_finite([vector])
            self._announcement = self._announce(self._loss, nonfinite=bad)
            self._told.append(self._announcement)

    def _end_round(self, original: Callable[..., Any]) -> Any:
        result = original()
        self._in_round = False
        return result

    # ---- the step ------------------------------------------------------------------------------

    def _ranks(self) -> list[RankSignals]:
        if not self._is_closed:
            self._in_round = False
            self._tell((), None)
        said = super()._ranks()
        rounds = [announcement.headers() for announcement in self._told]
        bad = [any(h.signals.nonfinite for h in of_rank) for of_rank in zip(*rounds, strict=True)]
        self._begin_step()
        return [replace(s, nonfinite=b) for s, b in zip(said, bad, strict=True)]

    def _forget(self) -> None:
        super()._forget()
        self._begin_step()

    def _begin_step(self) -> None:
        self._told = []
        self._in_round = self._is_closed = False


def warn_of_parameters(engine: Any, world_size: int) -> None:
    """Say what gathering whole parameters costs on this link; nothing at stage 0. Local."""
    stage, count = int(engine.zero_optimization_stage()), engine.gradient_accumulation_steps()
    if not stage:
        return
    optimizer = engine.optimizer
    is_bf16 = isinstance(optimizer, BF16_Optimizer)
    flats = optimizer.bf16_groups_flat if is_bf16 else optimizer.bit16_groups_flat
    gathered_bytes = sum(flat.numel() * flat.element_size() for flat in flats)
    sent_bytes = all_gather_bytes(-(-gathered_bytes // world_size), world_size)
    rounds = ROUNDS.format(count=count) if stage == 2 and count > 1 else ""
    logger.warning(GATHERED.format(stage=stage, gather=sent_bytes / 1e6, rounds=rounds))
