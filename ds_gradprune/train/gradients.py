"""Gradient mode: a gradient bucket is replaced by the sum of what all ranks send of theirs.

Islands send, one payload per element each: the ranks of an island sum a bucket among themselves and
divide the sum (`inside`). Every rank adds the same decoded payloads in the islands' order, so all
get equal bits. The result is a *sum*, as an all-reduce gives, so that DeepSpeed's own averaging,
pre-division and clipping stay in force around it.

What is not sent stays in the residual. The new one lies beside the old one until the step was
applied, so a step that is skipped, or that fails in a later bucket, touches none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ds_gradprune.bucket.apply import scatter_add
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.buckets import BUCKET_NUMEL, Bucket, cut
from ds_gradprune.train.clip import factors
from ds_gradprune.train.inside import Gradient, Inside
from ds_gradprune.train.message import Arrived, Memory, Message, Source, Stamp
from ds_gradprune.train.residual import Residuals
from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.channel import Channel, Pending
from ds_gradprune.wire.traffic import ring_all_reduce_bytes

__all__ = ["Gradient", "GradientPruning"]


class GradientPruning:
    """The algorithm of gradient mode on one rank.

    Args:
        channel: between the same-index ranks of all islands.
        stopwatch: waiting counts as "wire" there.
        value_bits: bits of a value on the wire.
        error_feedback: keep what was not sent and add it to the next gradient.
        bucket_numel: elements that are selected and applied at a time.
        inside: the ranks of this rank's island; None: it is alone in it.
        clip: a sender counts at most for so many times the median norm; None: as it is.

    Attributes:
        residuals: what this rank owes.
        channel: see there.
    """

    def __init__(
        self,
        channel: Channel,
        stopwatch: Stopwatch,
        *,
        value_bits: int,
        error_feedback: bool,
        bucket_numel: int = BUCKET_NUMEL,
        inside: Inside | None = None,
        clip: float | None = None,
    ) -> None:
        self.residuals = Residuals()
        self.channel = channel
        self._stopwatch = stopwatch
        self.value_bits = value_bits
        self._error_feedback = error_feedback
        self._bucket_numel = bucket_numel
        self._inside = inside
        self._clip = clip
        self._cuts: dict[tuple[Gradient, ...], tuple[Bucket, ...]] = {}
        self._memory = Memory()
        self._number = 0
        self._dense_bytes = 0
        self._open: list[Arrived] = []

    def begin(self) -> None:
        """A reduction of all gradients begins. Local."""
        self._number = 0

    def commit(self, *, applied: bool) -> None:
        """The optimizer has stepped, or has skipped its step. Local."""
        for arrived in self._open:
            arrived.finish(applied=applied)
        self._open = []
        self.channel.settle(applied=applied)
        if applied:
            self.residuals.commit()
        else:
            self.residuals.drop()

    def abort(self) -> None:
        """The step failed: nothing of it counts. Local."""
        self.commit(applied=False)

    def take_dense_bytes(self) -> int:
        """What this island would have sent without pruning since the last call. Local."""
        total, self._dense_bytes = self._dense_bytes, 0
        return total

    @torch.no_grad()
    def reduce(
        self,
        vector: torch.Tensor,
        gradients: Sequence[Gradient],
        k: int,
        *,
        step: int,
        signals: RankSignals,
        scale: float = 1.0,
        agreed: Callable[[], object] = bool,
    ) -> None:
        """Replace `vector` by the sum of what all islands send of theirs.

        Args:
            vector: (numel,) fp32, bf16 or fp16, contiguous; changed in place. If some island's
                gradient is not finite it becomes nan everywhere, and no residual is staged.
            gradients: what lies in it, in order.
            k: kept elements per full chunk.
            step: optimizer step under way, counted from 1.
            signals: this island's measurements, for the headers.
            scale: loss scale of `vector`.
            agreed: called before the payloads leave; raises where the islands disagree about them.

        Raises:
            TransportError, WireFormatError, RankMismatchError: the exchange failed, on all ranks of
                the island; no residual has changed.

        Collective: all ranks, same order.
        """
        self._count(vector)
        with self._share(vector, gradients) as (share, parts):
            self._reduce(share, parts, Stamp(step, self.channel.rank, k, signals), scale, agreed)

    def _reduce(
        self,
        vector: torch.Tensor,
        gradients: Sequence[Gradient],
        stamp: Stamp,
        scale: float,
        agreed: Callable[[], object],
    ) -> None:
        buckets = self._buckets(gradients)
        keys, numels = [g.key for g in gradients], [g.numel for g in gradients]
        owed = self.residuals.of(keys, numels, vector.device) if self._error_feedback else None
        sources = [
            Source(
                bucket.layout,
                vector[bucket.start : bucket.stop],
                None if owed is None else owed[bucket.start : bucket.stop],
                scale,
            )
            for bucket in buckets
        ]
        stamp = dataclasses.replace(stamp, first_bucket=self._number)
        self._number += len(buckets)
        message = Message(sources, stamp, self.value_bits, self.channel, self._memory)
        arrived = self._exchange(message, message.write(), agreed)
        if arrived.nonfinite:
            vector.fill_(float("nan"))
            arrived.finish(applied=False)
            return
        if self._clip is not None:
            arrived.factors = factors(arrived, len(buckets), self._clip, vector.device)
        self._open.append(arrived)
        staged = _unscaled(vector, owed, scale) if self._error_feedback else None
        self._apply(arrived, buckets, vector, staged, scale)
        if self._error_feedback:
            self.residuals.stage(keys, numels, staged)

    def _exchange(
        self, message: Message, payloads: torch.Tensor, agreed: Callable[[], object]
    ) -> Arrived:
        """Everything that all islands sent, verified on all ranks of this one. Collective."""
        pending: Pending | None = None
        try:
            with self._together():
                agreed()
                pending = self.channel.start(payloads, message.sizes, message.layouts)
                with self._stopwatch.phase("wire"):
                    pending.wait()
                arrived = message.arrived(pending)
        except Exception:
            self._memory.abandon()
            if pending is not None:
                pending.finish(applied=False)
            raise
        return arrived

    def _apply(
        self,
        arrived: Arrived,
        buckets: tuple[Bucket, ...],
        vector: torch.Tensor,
        staged: torch.Tensor | None,
        scale: float,
    ) -> None:
        """Let the vector be the sum of all deliveries; take the own part off the residual."""
        vector.zero_()
        for number, bucket in enumerate(buckets):
            here = slice(bucket.start, bucket.stop)
            for delivery, (block, is_own) in enumerate(arrived.deliveries(number, vector.device)):
                if staged is not None and is_own:
                    scatter_add(staged[here], block, -1.0 / scale)
                scatter_add(vector[here], block, arrived.factor(delivery))
            apart = arrived.sent(number, vector.device)
            if staged is not None and apart is not None:
                scatter_add(staged[here], apart, -1.0 / scale)

    @torch.no_grad()
    def reduce_dense(
        self,
        vector: torch.Tensor,
        gradients: Sequence[Gradient],
        *,
        nonfinite: bool,
        scale: float = 1.0,
    ) -> None:
        """Replace `vector` by its plain sum over ranks; the residual is sent with it.

        Args:
            vector: (numel,) any floating dtype; changed in place.
            gradients: what lies in it, in order.
            nonfinite: some rank's gradient is not finite: the residual is left alone.
            scale: loss scale of `vector`.

        Raises:
            TransportError: the exchange failed; no residual has changed.

        Collective: all ranks, same order; `nonfinite` must be agreed.
        """
        self._count(vector)
        with self._share(vector, gradients) as (share, parts):
            self._sum(share, parts, nonfinite=nonfinite, scale=scale)

    def _sum(
        self, vector: torch.Tensor, gradients: Sequence[Gradient], *, nonfinite: bool, scale: float
    ) -> None:
        keys, numels = [g.key for g in gradients], [g.numel for g in gradients]
        owed = self.residuals.of(keys, numels, vector.device) if self._error_feedback else None
        if not nonfinite:
            if owed is not None:
                vector.add_(owed, alpha=scale)
            for number, bucket in enumerate(self._buckets(gradients), start=self._number):
                here = vector[bucket.start : bucket.stop]
                self.channel.pay(number, bucket.layout, here, scale)
                self._number = number + 1
        with self._together(), self._stopwatch.phase("wire"):
            if vector.numel():
                self.channel.start_all_reduce(vector).wait()
        if owed is not None and not nonfinite:
            self.residuals.stage(keys, numels, None)

    # ---- details -------------------------------------------------------------------------------

    @contextmanager
    def _share(
        self, vector: torch.Tensor, gradients: Sequence[Gradient]
    ) -> Iterator[tuple[torch.Tensor, Sequence[Gradient]]]:
        """What this rank exchanges for its island, and what lies in it; its result goes to all."""
        if self._inside is None:
            yield vector, gradients
            return
        share, parts = self._inside.take(vector, gradients)
        yield share, parts
        self._inside.give(share, vector, gradients)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What fails inside on one rank is raised on all of its island."""
        error: Exception | None = None
        try:
            yield
        except Exception as exc:
            error = exc
        if self._inside is not None:
            with self._stopwatch.phase("wire"):  # for the rank whose peers are last
                self._inside.together(error)
        if error is not None:
            raise error

    def _count(self, vector: torch.Tensor) -> None:
        tensor_bytes = vector.numel() * vector.element_size()
        self._dense_bytes += ring_all_reduce_bytes(tensor_bytes, self.channel.world_size)

    def _buckets(self, gradients: Sequence[Gradient]) -> tuple[Bucket, ...]:
        together = tuple(gradients)
        buckets = self._cuts.get(together)
        if buckets is None:
            numels = [g.numel for g in together]
            offsets = [sum(numels[:i]) for i in range(len(numels))]
            buckets = cut(numels, [g.pruned for g in together], offsets, self._bucket_numel)
            self._cuts[together] = buckets
        return buckets


def _unscaled(vector: torch.Tensor, owed: torch.Tensor | None, scale: float) -> torch.Tensor:
    """What is owed and vector / scale together, in new memory."""
    if owed is None:
        return vector.to(torch.float32, copy=True).mul_(1.0 / scale)
    return owed.clone().add_(vector, alpha=1.0 / scale)
