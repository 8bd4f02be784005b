"""Update mode's dense exchange: the whole progress of all islands, summed in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.train.shared_weights import Bound
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
    def given(self) -> Iterator[tuple[Bound, torch.Tensor]]:
        """The whole progress, bucket after bucket. Local."""
        for bound in self._bounds:
            move = torch.cat(bound.own).sub_(bound.beside())
            if self._islands.kept is not None:
                store = self._islands.weights.stores[bound.store]
                kept = self._islands.kept
                move.add_(kept.of(bound, store), alpha=kept.decay)
            yield bound, move

    @torch.no_grad()
    def start(self) -> None:
        """Let the progress travel. Collective: all islands."""
        if self._nonfinite:
            return
        channel = self._islands.channel
        for number, (bound, move) in enumerate(self.given()):
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
        for bound, move in zip(self._bounds, self._moves, strict=True):
            move.mul_(islands.factor_at(CHUNK_NUMEL))
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
