"""The reductions of one round at ZeRO stages 1 and 2 that travel while backward goes on."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ds_gradprune.deepspeed.poison import refuse_poison
from ds_gradprune.errors import UnsupportedError
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.convoy import Convoy
from ds_gradprune.train.inside import Gradient
from ds_gradprune.train.load import Load, Sent
from ds_gradprune.wire.channel import Announcement, Pending

if TYPE_CHECKING:
    from ds_gradprune.deepspeed.zero_gradients import ZeroGradientHandle

OTHER_ORDER = (
    "DeepSpeed reduced gradients in another order than it had averaged them; this is not the "
    "DeepSpeed that gradient pruning was tested with"
)


@dataclass(frozen=True, slots=True)
class _Travel:
    """One reduction under way.

    Attributes:
        gradients: what lies in it, in order.
        vector: (numel,), what this rank puts in.
        load: its message.
        scale: loss scale of the vector.
    """

    gradients: tuple[Gradient, ...]
    vector: torch.Tensor
    load: Load
    scale: float


class Travels:
    """The reductions of a round.

    Args:
        handle: the engine's.
    """

    def __init__(self, handle: ZeroGradientHandle) -> None:
        self._handle = handle
        self._travels: deque[_Travel] = deque()
        self._told: list[Announcement] = []
        self._convoy = Convoy(handle.loop.stopwatch, handle.clock.now_s)

    def add(
        self, flat: torch.Tensor, gradients: tuple[Gradient, ...], signals: RankSignals
    ) -> None:
        """Let a reduction travel. Local.

        Args:
            flat: (numel,), what DeepSpeed reduces; copied.
            gradients: what lies in it, in order.
            signals: what this rank says of it.
        """
        handle = self._handle
        vector, scale, step = flat.clone(), handle.loss_scale(), handle.loop.exchange_step
        what = Sent(handle.k, step, signals, scale)
        load = handle.pruning.load(vector, gradients, what, place=len(self._travels))

        def depart() -> Pending:
            announcement = handle.announce(signals)
            self._told.append(announcement)
            load.write()
            ranks = [header.signals for header in announcement.headers()]
            refuse_poison(handle.engine, ranks, step, "rank")
            return load.start()

        self._travels.append(_Travel(gradients, vector, load, scale))
        self._convoy.add(depart)

    def land(self) -> list[Announcement]:
        """Wait until everything has arrived; what was announced, in order.

        Raises:
            NonFiniteError: a gradient holds inf or nan, and DeepSpeed would step with it.
            TransportError, WireFormatError, RankMismatchError: the exchange failed.

        Collective: all ranks.
        """
        self._convoy.close()
        self._convoy.land()
        return self._told

    def take(self, flat: torch.Tensor, gradients: tuple[Gradient, ...]) -> None:
        """Let `flat` be the sum of the next reduction. Local.

        Raises:
            UnsupportedError: DeepSpeed asks for another one.
            WireFormatError, RankMismatchError: a payload is damaged, or another one.
        """
        travel = self._travels.popleft() if self._travels else None
        if travel is None or travel.gradients != gradients:
            raise UnsupportedError(OTHER_ORDER)
        handle = self._handle
        with handle.loop.stopwatch.phase("codec"):
            flat.copy_(travel.vector)
            handle.pruning.land(flat, gradients, [travel.load], travel.scale)

    def give_up(self) -> None:
        """Nothing of what is left is applied, on any rank. Local."""
        self._convoy.close()
        self._handle.pruning.give_up([travel.load for travel in self._travels])
