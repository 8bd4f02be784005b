"""The dense warm-up of update mode: gradients are averaged over all islands, as DeepSpeed does.

At ZeRO stage 0 DeepSpeed's own all-reduce of a gradient bucket is done over our channel, between
the steps that it makes around it, so the result has the bits of a run without us. With several
ranks in an island, each of them carries its share of the bucket over the slow link. At stages 1 to
3 DeepSpeed averages inside the island, and what every rank is about to step with is averaged
between the islands before the optimizer steps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ds_gradprune.deepspeed import backend as backends
from ds_gradprune.deepspeed.gradient_handle import UNREDUCED, all_finite
from ds_gradprune.deepspeed.poison import refuse_poison
from ds_gradprune.errors import UnsupportedError
from ds_gradprune.wire.channel import Announcement
from ds_gradprune.wire.traffic import ring_all_reduce_bytes
from ds_gradprune.wire.transport import Work
from ds_gradprune.wire.trial import dense_seconds

if TYPE_CHECKING:
    from ds_gradprune.deepspeed.island_handle import IslandHandle


class Warmup:
    """Hooks gradient reduction of one engine in update mode.

    Args:
        handle: the engine's handle.
    """

    def __init__(self, handle: IslandHandle) -> None:
        self._handle = handle
        self._groups = handle.groups
        self._announcement: Announcement | None = None
        self._dense_bytes = 0
        self._is_partitioned = int(handle.engine.zero_optimization_stage()) > 0
        self._backend = backends.install()
        if self._is_partitioned:
            handle.hooks.replace("_take_model_step", self._before_model_step)
        else:
            handle.hooks.replace("buffered_allreduce_fallback", self._reduce_gradients)
            handle.hooks.replace("allreduce_bucket", self._reduce_bucket)

    def close(self) -> None:
        """Give DeepSpeed its backend back. Local."""
        backends.uninstall(self._backend)

    def before_step(self) -> None:
        """`engine.step` is about to begin. Collective: all ranks."""
        if self._is_partitioned and self._handle.engine.is_gradient_accumulation_boundary():
            self._try_link()

    def _try_link(self) -> None:
        """Before the first exchange of a run: is the link fit for dense ones?

        Where it is not, the step under way is no dense one any more. Collective: all ranks.
        """
        handle = self._handle
        loop = handle.loop
        if not (handle.is_warmup and loop.asks_for_trial):
            return
        with loop.stopwatch.stopped():
            compute_s, lasts_s = loop.stopwatch.compute_s, 0.0
            handle.channel.advance(loop.exchange_step)
            with handle.inside.together():
                lasts_s = dense_seconds(handle.channel, self._gradient_bytes(), handle.clock.now_s)
            mine = dataclasses.replace(
                loop.signals(None), compute_time_s=compute_s, comm_time_s=lasts_s
            )
            island, _ = handle.inside.agree(mine, 0)
            with handle.inside.together():
                headers = handle.announce(island).headers()
            handle.channel.take_wire_bytes()  # they belong to no exchange
            if loop.begin([header.signals for header in headers]):
                handle.tell_beginning()

    def _gradient_bytes(self) -> int:
        """Of what this rank carries in a dense exchange. Local."""
        if self._is_partitioned:
            return sum(g.numel() * g.element_size() for g in self._handle.shards.gradients())
        dtype: torch.dtype = self._handle.engine.communication_data_type
        return self._handle.islands.weights.numel * dtype.itemsize

    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A whole `engine.step` in the warm-up. Collective: all ranks."""
        handle = self._handle
        before = handle.engine.global_steps
        if self._is_partitioned:
            with self._groups.in_force():
                result = original(*args, **kwargs)
        else:
            with self.alone():
                result = original(*args, **kwargs)
        if handle.engine.global_steps == before:
            return result
        if self._announcement is None:
            raise UnsupportedError(UNREDUCED.format(step=handle.loop.exchange_step))
        ranks = [header.signals for header in self._announcement.headers()]
        _, wire_bytes = handle.inside.outcome(wire_bytes=handle.channel.take_wire_bytes())
        dense_bytes, self._dense_bytes, self._announcement = self._dense_bytes, 0, None
        handle.losses.reset()
        handle.loop.begin_exchange()
        handle.finish(ranks, wire_bytes=wire_bytes, dense_bytes=dense_bytes)
        handle.loop.end_step()
        return result

    def alone(self) -> AbstractContextManager[None]:
        """DeepSpeed waits for nobody inside, where ranks may be gone. Local."""
        if self._handle.crew is None:
            return nullcontext()
        return self._backend.alone(self._groups.everyone, self._groups.inner)

    # ---- stage 0 -------------------------------------------------------------------------------

    def _reduce_gradients(
        self,
        original: Callable[..., Any],
        grads: list[torch.Tensor] | None = None,
        elements_per_buffer: int = 500_000_000,
    ) -> Any:
        handle = self._handle
        self._try_link()
        if handle.is_warmup:
            with handle.loop.stopwatch.phase("codec"):
                if grads is None:
                    grads, _ = handle.engine._get_gradients_for_reduction()
                nbytes = sum(grad.numel() * grad.element_size() for grad in grads)
                self._announce(nonfinite=not all_finite(grads), gradient_bytes=nbytes)
            return original(grads=grads, elements_per_buffer=elements_per_buffer)
        if self._groups.inner is None:
            handle.engine._get_gradients_for_reduction()  # as DeepSpeed: zeros where is none
            return None
        with self._groups.in_force():
            return original(grads=grads, elements_per_buffer=elements_per_buffer)

    def _reduce_bucket(
        self,
        original: Callable[..., Any],
        bucket: list[torch.Tensor],
        dp_group: Any,
        dp_world_size: int | None = None,
    ) -> Any:
        if not self._handle.is_warmup:
            return original(bucket, dp_group, dp_world_size)
        with self._backend.gradient_bucket(self._sum):
            return original(bucket, dp_group, dp_world_size)

    def _sum(self, vector: torch.Tensor) -> None:
        """Replace a bucket by its sum over all ranks."""
        groups, stopwatch = self._groups, self._handle.loop.stopwatch
        with stopwatch.phase("wire"):
            if groups.inner is None:
                self._sum_outside(vector)
                return
            dist.all_reduce(vector, group=groups.inner)
            shares = _equal_shares(vector, groups.num_shards)
            with self._handle.inside.together():
                if shares[groups.shard].numel():
                    self._sum_outside(shares[groups.shard])
            for shard, share in enumerate(shares):
                if share.numel():
                    source = dist.get_global_rank(groups.inner, shard)
                    dist.broadcast(share, src=source, group=groups.inner)

    def _sum_outside(self, share: torch.Tensor) -> None:
        work = self._handle.channel.start_all_reduce(share)
        work.wait()
        num_islands, count = self._groups.num_islands, self._count(work)
        if count < num_islands:  # DeepSpeed divides by all that there were
            share.mul_(num_islands / count)

    # ---- stages 1 to 3 -------------------------------------------------------------------------

    def _before_model_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        handle = self._handle
        if handle.is_warmup:
            with handle.loop.stopwatch.phase("codec"):
                self._average()
        return original(*args, **kwargs)

    @torch.no_grad()
    def _average(self) -> None:
        handle = self._handle
        gradients = [g for g in handle.shards.gradients() if g.numel()]
        nbytes = sum(g.numel() * g.element_size() for g in gradients)
        self._announce(nonfinite=not all_finite(gradients), gradient_bytes=nbytes)
        with handle.loop.stopwatch.phase("wire"), handle.inside.together():
            works = [handle.channel.start_all_reduce(gradient) for gradient in gradients]
            for work in works:
                work.wait()
        for gradient, work in zip(gradients, works, strict=True):
            gradient.mul_(1.0 / self._count(work))
        handle.shards.gradients_changed()

    def _count(self, work: Work) -> int:
        """Islands whose gradients are in a sum: some may have been lost."""
        return self._groups.num_islands if work.took_part is None else len(work.took_part)

    def _announce(self, *, nonfinite: bool, gradient_bytes: int) -> None:
        handle = self._handle
        handle.channel.advance(handle.loop.exchange_step)
        signals = handle.loop.signals(handle.losses.so_far(), nonfinite=nonfinite)
        mine = ring_all_reduce_bytes(gradient_bytes, self._groups.num_islands)
        if not self._is_partitioned and self._groups.inner is not None:
            mine //= self._groups.num_shards  # its share of every bucket
        signals, dense_bytes = handle.inside.agree(handle.asking(signals), mine)
        self._dense_bytes += dense_bytes
        self._announcement = handle.announce(signals)
        with handle.loop.stopwatch.phase("wire"), handle.inside.together():
            headers = self._announcement.headers()
        ranks = [header.signals for header in headers]
        refuse_poison(handle.engine, ranks, handle.loop.exchange_step, "island")


def _equal_shares(vector: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Contiguous views of a vector, one for each rank of an island; some may be empty."""
    cuts = [vector.numel() * i // count for i in range(count + 1)]
    return [vector[start:stop] for start, stop in itertools.pairwise(cuts)]
