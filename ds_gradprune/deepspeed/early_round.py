"""The buckets of one backward at ZeRO stage 0 that leave while it goes on; see `early`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.buckets import Bucket
from ds_gradprune.train.convoy import Convoy
from ds_gradprune.train.inside import Gradient
from ds_gradprune.train.load import Load, Sent
from ds_gradprune.wire.channel import Announcement, Pending

if TYPE_CHECKING:
    from ds_gradprune.deepspeed.gradient_handle import GradientHandle

BROKEN = (
    "a backward has ended in an error while its gradients were on their way to the other ranks. "
    "Restart from the last checkpoint."
)

Reduction = Callable[[list[torch.Tensor]], Any]


@dataclass(frozen=True, slots=True)
class Vector:
    """What DeepSpeed reduces together.

    Attributes:
        gradients: what lies in it, in order.
        reduction: DeepSpeed's own, of any tensors.
        buckets: how it is cut.
        before: buckets of the vectors before it.
    """

    gradients: tuple[Gradient, ...]
    reduction: Reduction
    buckets: tuple[Bucket, ...]
    before: int


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A bucket that has not left.

    Attributes:
        vector: which it belongs to.
        number: in that vector.
        missing: parameters whose gradients are not complete.
    """

    vector: int
    number: int
    missing: set[str]


class _Taken(Exception):
    """What DeepSpeed would reduce is known; what it does afterwards is not wanted."""


class Round:
    """The buckets of one backward, in the order in which they leave.

    Args:
        handle: the engine's.
        vectors: what DeepSpeed will reduce.
        parameters: by name.
        idle: those that get no gradient as a rule, on some rank; their buckets leave last.

    Attributes:
        loads: what has left of every vector.
    """

    def __init__(
        self,
        handle: GradientHandle,
        vectors: Sequence[Vector],
        parameters: dict[str, torch.nn.Parameter],
        idle: Set[str],
    ) -> None:
        self.loads: list[list[Load]] = [[] for _ in vectors]
        self._handle = handle
        self._vectors = vectors
        self._parameters = parameters
        self._seen: dict[str, tuple[torch.Tensor, int]] = {}
        self._told: Announcement | None = None
        self._num_sent = 0
        self._of: dict[str, list[_Waiting]] = {}
        self._order = [
            _Waiting(index, number, {vector.gradients[p.piece].key for p in bucket.parts})
            for index, vector in reversed(list(enumerate(vectors)))
            for number, bucket in reversed(list(enumerate(vector.buckets)))
        ]
        self._order.sort(key=lambda waiting: bool(waiting.missing & idle))
        for waiting in self._order:
            for name in waiting.missing:
                self._of.setdefault(name, []).append(waiting)
        handle.channel.advance(handle.loop.exchange_step)
        handle.pruning.begin()
        self._signals = handle.loop.signals(None)
        self._convoy = Convoy(handle.loop.stopwatch, handle.clock.now_s)

    def ready(self, name: str) -> None:
        """The gradient of a parameter is complete. Local."""
        for waiting in self._of.get(name, ()):
            waiting.missing.discard(name)
        while self._num_sent < len(self._order) and not self._order[self._num_sent].missing:
            self._send(self._order[self._num_sent])

    def send_rest(self) -> None:
        """Backward is over: everything is complete. Local."""
        while self._num_sent < len(self._order):
            self._send(self._order[self._num_sent])

    def has_changed(self) -> bool:
        """Whether a gradient has changed since it left. Local."""
        return any(
            self._parameters[name].grad is not grad or grad._version != version
            for name, (grad, version) in self._seen.items()
        )

    def land(self, signals: RankSignals) -> Announcement:
        """Wait until everything has arrived.

        Args:
            signals: this rank's last word.

        Returns:
            What all ranks have said last.

        Raises:
            TransportError, WireFormatError, RankMismatchError: the exchange failed.

        Collective: all ranks.
        """

        def tell() -> None:
            self._told = self._handle.announce(signals)

        self._convoy.close(tell)
        self._convoy.land()
        assert self._told is not None
        self._told.headers()
        return self._told

    def give_up(self) -> None:
        """Nothing is applied, on any rank. Local."""
        self._convoy.close()
        self._handle.pruning.give_up([load for loads in self.loads for load in loads])

    def _send(self, waiting: _Waiting) -> None:
        handle, place = self._handle, self._num_sent
        self._num_sent += 1
        vector = self._vectors[waiting.vector]
        flat = self._reduced(vector, vector.buckets[waiting.number])
        what = Sent(handle.k, handle.loop.exchange_step, self._signals, handle.loss_scale())
        only = (waiting.number, vector.before)
        load = handle.pruning.load(flat, vector.gradients, what, only=only, place=place)
        self.loads[waiting.vector].append(load)

        def depart() -> Pending:
            told = handle.announce(self._signals) if place == 0 else None
            load.write()
            if told is not None:
                told.headers()
            return load.start()

        self._convoy.add(depart)

    def _reduced(self, vector: Vector, bucket: Bucket) -> torch.Tensor:
        """(numel,), what DeepSpeed would reduce of a bucket: scaled, and of its data type."""
        parts = []
        for part in bucket.parts:
            name = vector.gradients[part.piece].key
            grad = self._parameters[name].grad
            assert grad is not None
            self._seen.setdefault(name, (grad, grad._version))
            parts.append(grad.detach().reshape(-1)[part.start : part.stop])
        if len(parts) == 1:
            parts = [parts[0].clone()]  # DeepSpeed scales a single tensor in place
        taken: list[torch.Tensor] = []

        def take(flat: torch.Tensor) -> None:
            taken.append(flat)
            raise _Taken

        with contextlib.suppress(_Taken), self._handle.backend.gradient_bucket(take):
            vector.reduction(parts)
        return taken[0]
