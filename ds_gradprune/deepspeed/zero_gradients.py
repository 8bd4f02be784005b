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

With `overlap` a round's reductions travel while backward goes on, and DeepSpeed's buckets are held
back until they are over: see `held`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import google_crc32c
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from ds_gradprune.deepspeed.early_round import BROKEN
from ds_gradprune.deepspeed.gradient_handle import GradientHandle, all_finite
from ds_gradprune.deepspeed.held import HeldBuckets
from ds_gradprune.deepspeed.hooks import Hooks
from ds_gradprune.deepspeed.places import Place, Places, gradient_of, place_of
from ds_gradprune.deepspeed.travels import Travels
from ds_gradprune.errors import TransportError
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
LATE = (
    "gradient_pruning.overlap: ZeRO stage 1 reduces gradients after backward. Set "
    "zero_optimization.overlap_comm to true, and it reduces them while backward goes on."
)
LATE_SUMS = (
    "gradient_pruning.overlap hides nothing here: gradients that are summed in fp32 beside bf16 "
    "weights are complete only after backward."
)


class ZeroGradientHandle(GradientHandle):
    """`engine.gradprune` of an engine whose `DeepSpeedZeroOptimizer` reduces gradients."""

    def _hook(self) -> None:
        self._told: list[Announcement] = []
        self._in_round = self._is_closed = False
        self._has_owners = self.config.exchange_of(self.channel.world_size) == "owner_reduce"
        self._loss: float | None = None
        self._travels: Travels | None = None
        self._held = HeldBuckets(self.engine.optimizer)
        self._is_ending = self._is_broken = False
        self._optimizer_hooks = Hooks(self.engine.optimizer, "engine.optimizer")
        hooks: list[tuple[str, Callable[..., Any]]] = [
            ("reduce_ipg_grads", self._reduce_buckets),
            ("gradient_reduction_w_predivide", self._reduce_whole),
            ("allreduce_bucket", self._reduce_slices),
            ("overlapping_partition_gradients_reduce_epilogue", self._end_round),
        ]
        for name, hook in hooks + (self._held.hooks() if self.config.overlap else []):
            self._optimizer_hooks.replace(name, hook)

    def _before_detach(self) -> None:
        self._optimizer_hooks.check()
        super()._before_detach()
        self._optimizer_hooks.remove()

    # ---- the reductions of a round -------------------------------------------------------------

    def _reduce_buckets(self, original: Callable[..., Any], comm_dtype: Any = None) -> Any:
        """Note whose gradients lie where before DeepSpeed reduces and forgets them."""
        if self.config.overlap and self.loop.decision.density < 1.0:
            self._let_leave(original, comm_dtype)
            return None
        return self._reduce_now(original, comm_dtype)

    def _let_leave(self, original: Callable[..., Any], comm_dtype: Any) -> None:
        """What lies in the buckets travels; the epilogue waits for everything of the round."""
        if self._is_broken:
            raise TransportError(BROKEN)
        travels = self._travels = self._travels or Travels(self)
        for dtype in self._held.dtypes(comm_dtype):
            self._places = Places(self._lay_out(dtype))
            self._held.hold(dtype)
        if not self._is_ending:
            return
        try:
            self._told += travels.land()
            self._announcement = self._told[-1] if self._told else None
            self._held.release(partial(self._reduce_now, original))
        except BaseException:
            travels.give_up()
            self._held.forget()
            raise
        finally:
            self._travels = None
        self._reduce_now(original, comm_dtype)  # of empty buckets

    def _reduce_now(self, original: Callable[..., Any], comm_dtype: Any) -> Any:
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
            if self._travels is None:
                self._tell(gradients, flat)
                self._reduce(flat, gradients)
            elif self._held.is_holding:
                self._travels.add(flat, gradients, self._note(gradients, flat))
            else:
                self._travels.take(flat, gradients)

        with self.backend.gradient_bucket(reduce):
            return original(*args, **kw)

    def _tell(self, gradients: tuple[Gradient, ...], vector: torch.Tensor | None) -> None:
        """Announce a reduction; None: nothing is reduced, only the loss is told. Collective."""
        with self.loop.stopwatch.phase("codec"):
            self._announcement = self._announce(self._note(gradients, vector))
            self._told.append(self._announcement)

    def _note(self, gradients: tuple[Gradient, ...], vector: torch.Tensor | None) -> RankSignals:
        """What this rank says of a reduction. Local."""
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
        return self.loop.signals(self._loss, nonfinite=bad)

    def _end_round(self, original: Callable[..., Any]) -> Any:
        self._is_ending = True
        try:
            result = original()
        finally:
            self._is_ending = False
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

    def _interrupt(self) -> None:
        if self._travels is not None:
            self._travels.give_up()
            self._travels, self._is_broken = None, True
            self._held.forget()

    def _abort(self) -> None:
        self._interrupt()
        super()._abort()

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


def warn_of_late_gradients(engine: Any) -> None:
    """Say where `overlap` cannot let gradients leave during backward. Local."""
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        logger.warning(LATE_SUMS)
    elif int(engine.zero_optimization_stage()) == 1 and not optimizer.overlap_comm:
        logger.warning(LATE)
