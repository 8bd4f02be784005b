"""Gradient mode: a gradient bucket is replaced by the sum of what all ranks send of theirs.

Islands send, one payload per element each: the ranks of an island sum a bucket among themselves and
divide the sum (`inside`). Every rank adds the same decoded payloads in the islands' order, so all
get equal bits. The result is a *sum*, as an all-reduce gives, so that DeepSpeed's own averaging,
pre-division and clipping stay in force around it.

What is not sent stays in the residual. The new one lies beside the old one until the step was
applied, so a step that is skipped, or that fails in a later bucket, touches none.

Longer than 300 lines: a sum that is waited for, one that travels in parts, and the dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ds_gradprune.bucket.apply import scatter_add
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.buckets import BUCKET_NUMEL, Bucket, cut
from ds_gradprune.train.clip import factors
from ds_gradprune.train.inside import Gradient, Inside
from ds_gradprune.train.load import Joined, Load, Sent
from ds_gradprune.train.message import Memory, Message, Source, Stamp
from ds_gradprune.train.residual import Residuals
from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.channel import Channel
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
        self._open: list[Joined] = []

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
            load = self.load(share, parts, Sent(k, step, signals, scale))
            self._take(share, parts, self._exchange(load, agreed), scale)

    def buckets(self, gradients: Sequence[Gradient]) -> tuple[Bucket, ...]:
        """How a vector of these is cut. Local."""
        together = tuple(gradients)
        buckets = self._cuts.get(together)
        if buckets is None:
            numels = [g.numel for g in together]
            offsets = [sum(numels[:i]) for i in range(len(numels))]
            buckets = cut(numels, [g.pruned for g in together], offsets, self._bucket_numel)
            self._cuts[together] = buckets
        return buckets

    def load(
        self,
        vector: torch.Tensor,
        gradients: Sequence[Gradient],
        what: Sent,
        *,
        only: tuple[int, int] | None = None,
        place: int = 0,
    ) -> Load:
        """Prepare to send a vector, or a bucket of it; nothing changes. Local.

        Args:
            vector: (numel,), or that bucket's elements alone.
            gradients: what lies in the whole vector, in order.
            what: what the payloads say.
            only: a bucket, and how many of the step lie before this vector; None: all of them.
            place: of the message among those under way together.
        """
        whole = self.buckets(gradients)
        owed = self._owed(gradients, vector.device)
        first, before = (0, self._number) if only is None else only
        buckets = whole if only is None else whole[first : first + 1]
        start = buckets[0].start if buckets else 0
        sources = [
            Source(
                bucket.layout,
                vector[bucket.start - start : bucket.stop - start],
                None if owed is None else owed[bucket.start : bucket.stop],
                what.scale,
            )
            for bucket in buckets
        ]
        stamp = Stamp(what.step, self.channel.rank, what.k, what.signals, before + first)
        if only is None:
            self._number += len(whole)
        message = Message(sources, stamp, self.value_bits, self.channel, self._memory, place)
        return Load(message, self.channel, first)

    @torch.no_grad()
    def land(
        self,
        vector: torch.Tensor,
        gradients: Sequence[Gradient],
        loads: Sequence[Load],
        scale: float = 1.0,
    ) -> None:
        """Replace `vector` by the sum of what has arrived of it.

        Args:
            vector: (numel,), as it was when it was loaded; changed in place as by `reduce`.
            gradients: what lies in it, in order.
            loads: of all its buckets, waited for; in any order.
            scale: loss scale of `vector`.

        Raises:
            WireFormatError, RankMismatchError: a payload is damaged, or another one; no residual
                has changed.

        Local.
        """
        try:
            parts = [load.arrived() for load in sorted(loads, key=lambda load: load.first)]
        except Exception:
            self.give_up(loads)
            raise
        self._count(vector)
        self._take(vector, gradients, Joined(parts), scale)

    def give_up(self, loads: Sequence[Load]) -> None:
        """Nothing of these is applied, on any rank. Local."""
        self._memory.abandon()
        for load in loads:
            load.abandon()

    def _take(
        self,
        vector: torch.Tensor,
        gradients: Sequence[Gradient],
        arrived: Joined,
        scale: float,
    ) -> None:
        """Let a vector be what has arrived, and stage what is owed then."""
        if arrived.nonfinite:
            vector.fill_(float("nan"))
            arrived.finish(applied=False)
            return
        if self._clip is not None:
            arrived.factors = factors(arrived, arrived.num_buckets, self._clip, vector.device)
        self._open.append(arrived)
        staged = None
        if self._error_feedback:
            staged = _unscaled(vector, self._owed(gradients, vector.device), scale)
        self._apply(arrived, self.buckets(gradients), vector, staged, scale)
        if self._error_feedback:
            keys, numels = [g.key for g in gradients], [g.numel for g in gradients]
            self.residuals.stage(keys, numels, staged)

    def _exchange(self, load: Load, agreed: Callable[[], object]) -> Joined:
        """Everything that all islands sent, verified on all ranks of this one. Collective."""
        load.write()
        try:
            with self._together():
                agreed()
                load.start()
                with self._stopwatch.phase("wire"):
                    load.wait()
                arrived = load.arrived()
        except Exception:
            self.give_up([load])
            raise
        return Joined([arrived])

    def _owed(self, gradients: Sequence[Gradient], device: torch.device) -> torch.Tensor | None:
        """(numel,) fp32, what these are owed; None: nothing."""
        if not self._error_feedback:
            return None
        return self.residuals.of([g.key for g in gradients], [g.numel for g in gradients], device)

    def _apply(
        self,
        arrived: Joined,
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
        owed = self._owed(gradients, vector.device)
        if not nonfinite:
            if owed is not None:
                vector.add_(owed, alpha=scale)
            for number, bucket in enumerate(self.buckets(gradients), start=self._number):
                here = vector[bucket.start : bucket.stop]
                self.channel.pay(number, bucket.layout, here, scale)
                self._number = number + 1
        with self._together(), self._stopwatch.phase("wire"):
            if vector.numel():
                self.channel.start_all_reduce(vector).wait()
        if owed is not None and not nonfinite:
            keys, numels = [g.key for g in gradients], [g.numel for g in gradients]
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


def _unscaled(vector: torch.Tensor, owed: torch.Tensor | None, scale: float) -> torch.Tensor:
    """What is owed and vector / scale together, in new memory."""
    if owed is None:
        return vector.to(torch.float32, copy=True).mul_(1.0 / scale)
    return owed.clone().add_(vector, alpha=1.0 / scale)
