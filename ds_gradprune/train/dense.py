"""Update mode's dense exchange: the whole progress of all islands, summed in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.wire.transport import Work

if TYPE_CHECKING:
    from ds_gradprune.train.islands import Islands


class DenseExchange:
    """An exchange of everything: the progress of all islands is summed in fp32.

    Needs 4 bytes per parameter while it is under way, because nothing may move before all of it is
    there.
    """

    def __init__(self, islands: Islands, nonfinite: Sequence[int]) -> None:
        self.sizes: Sequence[int] = ()
        self._islands = islands
        self._bounds = islands.weights.bound()
        self._nonfinite = list(nonfinite)
        self._moves: list[torch.Tensor] = []
        self._works: list[Work] = []

    def write(self) -> None:
        """Nothing to do."""

    def abort(self) -> None:
        """Give up what was paid. Local."""
        self._islands.channel.settle(applied=False)

    @torch.no_grad()
    def start(self) -> None:
        """Let the progress travel. Collective: all islands."""
        if self._nonfinite:
            return
        channel, kept = self._islands.channel, self._islands.kept
        for number, bound in enumerate(self._bounds):
            move = torch.cat(bound.own).sub_(bound.beside())
            if kept is not None:
                store = self._islands.weights.stores[bound.store]
                move.add_(kept.of(bound, store), alpha=kept.decay)
            channel.pay(number, bound.layout, move)
            self._moves.append(move)
            self._works.append(channel.start_all_reduce(move))

    def wait(self) -> None:
        """Return when all sums are there. Collective."""
        for work in self._works:
            work.wait()

    def deliver(self) -> list[int]:
        """Wait; the islands with inf or nan. Collective."""
        with self._islands.stopwatch.phase("wire"):
            self.wait()
        return self._nonfinite

    @torch.no_grad()
    def commit(self) -> None:
        """Move shared and own weights by the mean. Local."""
        islands = self._islands
        for bound, move, work in zip(self._bounds, self._moves, self._works, strict=True):
            count = None if work.took_part is None else len(work.took_part)
            move.mul_(islands.factor_at(CHUNK_NUMEL, count))
            shared = bound.beside()
            store = islands.weights.stores[bound.store]
            if islands.kept is not None:
                islands.kept.of(bound, store).zero_()
            islands.rule.begin(bound.store, store, bound.start, bound.stop)
            islands.rule.note_dense(move)
            shared.add_(move)
            drift = islands.rule.drift()
            if drift is not None:
                shared.add_(drift)
            for own, part in zip(bound.own, bound.split(shared), strict=True):
                own.copy_(part)
            bound.give_back(shared)
        islands.channel.settle(applied=True)
