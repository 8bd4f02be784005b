"""Gradients at ZeRO stage 0 that leave while backward goes on (`overlap`).

DeepSpeed reduces all gradients in one go when backward is over. Their buckets are known from the
last time that it did. In the last micro-step a bucket leaves as soon as the gradients in it are
complete, the last bucket of the model first, so that all ranks send in one order. DeepSpeed's own
reduction then finds the sums, so its averaging and its copies stay in force.

What leaves early is a guess: that nothing adds to a gradient later. With reentrant checkpointing a
tied weight gets its gradient in several parts, and a hook of somebody else may change one. So every
rank says after backward whether a gradient has changed since it left. If one has, on any rank,
nothing of it is applied, all is exchanged again, and no gradient leaves early from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from ds_gradprune.deepspeed.early_round import BROKEN, Reduction, Round, Vector
from ds_gradprune.deepspeed.poison import refuse_poison
from ds_gradprune.errors import TransportError
from ds_gradprune.train.inside import Gradient
from ds_gradprune.train.load import Load
from ds_gradprune.wire.channel import Announcement

if TYPE_CHECKING:
    from ds_gradprune.deepspeed.gradient_handle import GradientHandle

logger = logging.getLogger(__name__)

CHANGED = (
    "gradient_pruning.overlap: in step %d a gradient changed after it had left, as with reentrant "
    "checkpointing of a tied weight. It was exchanged again. From now on gradients leave when "
    "backward is over."
)


class EarlyBuckets:
    """Lets the gradients of an engine leave while backward goes on.

    Args:
        handle: the engine's; its hooks keep ours.
    """

    def __init__(self, handle: GradientHandle) -> None:
        self._handle = handle
        self._parameters = dict(handle.engine.module.named_parameters())
        self._vectors: list[Vector] = []
        self._fired: set[str] = set()
        self._idle: frozenset[str] | None = None
        self._round: Round | None = None
        self._arrived: Round | None = None
        self._is_late = self._is_off = self._is_broken = False
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                hook = partial(self._is_ready, name)
                handle.hooks.keep(parameter.register_post_accumulate_grad_hook(hook))

    def note(self, gradients: tuple[Gradient, ...], reduction: Reduction) -> None:
        """DeepSpeed reduces these together, and did so with nothing sent before. Local."""
        buckets = self._handle.pruning.buckets(gradients)
        before = sum(len(vector.buckets) for vector in self._vectors)
        self._vectors.append(Vector(gradients, reduction, buckets, before))

    def finish(self, loss: float | None, *, nonfinite: bool) -> Announcement | None:
        """Backward is over: send what is left, and wait for everything.

        Args:
            loss: of the step under way.
            nonfinite: this rank's gradients hold inf or nan.

        Returns:
            What all ranks have said; None: nothing holds of what has left, and all gradients are to
            be exchanged now.

        Raises:
            NonFiniteError: a gradient holds inf or nan, and DeepSpeed would step with it.
            TransportError, WireFormatError, RankMismatchError: the exchange failed.

        Collective: all ranks.
        """
        self._arrived = None
        is_open = self._round is not None or self._opens()
        self._is_late = False
        if not is_open:
            self._vectors, self._idle = [], None  # DeepSpeed reduces them now, and they are noted
            return None
        round_, self._round = self._round, None
        assert round_ is not None
        round_.send_rest()
        loop = self._handle.loop
        changed = round_.has_changed()
        try:
            told = round_.land(loop.signals(loss, nonfinite=nonfinite, written=changed))
            ranks = [header.signals for header in told.headers()]
            refuse_poison(self._handle.engine, ranks, loop.exchange_step, "rank")
        except BaseException:
            round_.give_up()
            raise
        if any(signals.written for signals in ranks):
            round_.give_up()
            self._is_off = True
            logger.warning(CHANGED, loop.exchange_step)
            return None
        self._arrived = round_
        return told

    def settle(self) -> None:
        """A step is over: once they are noted, agree which gradients to wait for. Collective."""
        fired, self._fired = self._fired, set()
        if self._idle is not None or self._is_off or not self._vectors:
            return
        names = [gradient.key for vector in self._vectors for gradient in vector.gradients]
        mine = torch.tensor([name in fired for name in names], dtype=torch.uint8)
        transport = self._handle.seat.transport
        rows = torch.empty(transport.world_size, len(names), dtype=torch.uint8)
        transport.all_gather(mine, rows)
        seen = rows.bool().all(dim=0).tolist()
        self._idle = frozenset(n for n, is_seen in zip(names, seen, strict=True) if not is_seen)

    def loads(self, gradients: Sequence[Gradient]) -> list[Load] | None:
        """What has arrived of a vector; None: nothing was sent of it before. Local."""
        if self._arrived is None:
            return None
        for index, vector in enumerate(self._vectors):
            if vector.gradients == tuple(gradients):
                return self._arrived.loads[index]
        return None

    def give_up(self) -> None:
        """The step has failed. Local."""
        if self._arrived is not None:
            self._arrived.give_up()
            self._arrived = None
        self.interrupt()

    def interrupt(self) -> None:
        """A backward has failed, and what left in it may be on its way. Local."""
        if self._round is not None:
            self._round.give_up()
            self._round, self._is_broken = None, True

    def _is_ready(self, name: str, _parameter: torch.Tensor) -> None:
        self._fired.add(name)
        if self._round is None and not self._opens():
            return
        assert self._round is not None
        with self._handle.loop.stopwatch.phase("codec"):
            self._round.ready(name)

    def _opens(self) -> bool:
        """Begin a round if this backward is one whose gradients leave early. Local."""
        handle = self._handle
        if self._is_broken:
            raise TransportError(BROKEN)
        if self._is_off or self._is_late or handle.loop.decision.density == 1.0:
            return False
        engine = handle.engine
        if engine.inside_no_sync_ctxt or not engine.is_gradient_accumulation_boundary():
            return False
        known = {gradient.key for vector in self._vectors for gradient in vector.gradients}
        now = {n for n, p in self._parameters.items() if p.requires_grad and p.numel()}
        if known != now or self._idle is None:
            self._is_late = True  # until they have been reduced once
            return False
        self._round = Round(handle, self._vectors, self._parameters, self._idle)
        return True
