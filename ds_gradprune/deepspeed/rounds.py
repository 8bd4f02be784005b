"""The exchange that ends a round of an island: waited for at once, or hidden behind the next steps.

    step t0      prepare and write the payloads; announce
    t0 .. t0+d   they travel while the island trains on (with `overlap`; else d is 0)
    step t0 + d  deliver and commit; the law decides

The delay d is decided by the configuration, not by when the bytes arrive, so all islands apply an
exchange after the same step. Whoever needs the shared weights earlier lands the exchange earlier:
they take the same values then, because nothing else moves them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_gradprune.law.decision import Cause
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.flight import Flight
from ds_gradprune.train.islands import Prepared, refuse
from ds_gradprune.wire.channel import Announcement

if TYPE_CHECKING:
    from ds_gradprune.deepspeed.island_handle import IslandHandle

Ranks = list[RankSignals]


@dataclass(frozen=True)
class _Begun:
    """An exchange under way.

    Attributes:
        step: the optimizer step that it follows.
        lands_after: the step after which it is applied.
        prepared: its payloads.
        signals: what this island said.
        dense_bytes: what it would have sent without pruning.
        flight: carries it; None: it was waited for.
        ranks: what all islands said, if it was waited for.
    """

    step: int
    lands_after: int
    prepared: Prepared
    signals: RankSignals
    dense_bytes: int
    flight: Flight[Ranks] | None
    ranks: Ranks | None


class Rounds:
    """Begins and lands the exchanges of one engine.

    Args:
        handle: the engine's handle.
        delay_steps: optimizer steps from an exchange to its commit; 0: it is waited for.
    """

    def __init__(self, handle: IslandHandle, delay_steps: int) -> None:
        self._handle = handle
        self._delay_steps = delay_steps
        self._begun: _Begun | None = None
        self._pieces_crc = 0

    def end_step(self) -> None:
        """The optimizer has stepped: land what is due, begin what is due. Collective."""
        loop = self._handle.loop
        if self._begun is not None and loop.exchange_step >= self._begun.lands_after:
            self.land()
        if loop.is_due:
            self.land()
            with loop.stopwatch.phase("codec"):
                self._begun = self._begin()
            if self._begun.flight is None:
                self.land()
        loop.end_step()

    def land(self) -> None:
        """Apply the exchange under way, if there is one, and decide. Collective: the island.

        Raises:
            NonFiniteError: some island's weights hold inf or nan, on all ranks alike.
            TransportError, WireFormatError, RankMismatchError: the exchange failed. Nothing has
                moved, in any of these cases.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return
        handle = self._handle
        stopwatch = handle.loop.stopwatch
        with stopwatch.phase("codec"):
            ranks = self._wait(begun)
            if any(rank.written for rank in ranks):
                self._compare_written(begun.signals)
            self._apply(begun)
            handle.shards.publish()
        handle.finish(ranks, begun.dense_bytes)

    def state_dict(self) -> dict[str, int]:
        """What affects the next exchange; nothing may be under way. Local."""
        assert self._begun is None
        return {"pieces_crc": self._pieces_crc}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what `state_dict` gave. Local."""
        self._begun = None
        self._pieces_crc = int(state["pieces_crc"])

    def _begin(self) -> _Begun:
        handle = self._handle
        islands, loop, k = handle.islands, handle.loop, handle.k
        self._note_pieces()
        loop.begin_exchange()
        step = loop.last_exchange
        is_dense = loop.decision.density == 1.0 and not self._sends_all_in_levels()
        signals, dense_bytes = handle.inside.agree(
            loop.signals(
                handle.losses.take(),
                nonfinite=is_dense and not islands.weights.is_finite(),
                written=bool(handle.weights.written),
            ),
            islands.dense_bytes(),
        )
        if is_dense:
            announcement = handle.announce(signals)
            with loop.stopwatch.phase("wire"):
                ranks = _signals(announcement)
            bad = [island for island, rank in enumerate(ranks) if rank.nonfinite]
            prepared = islands.prepare_dense(bad)
            prepared.start()
            return _Begun(step, step, prepared, signals, dense_bytes, None, ranks)
        hides = self._delay_steps > 0
        prepared = islands.prepare(k, step=step, signals=signals, hides=hides)
        announcement = handle.announce(signals, prepared.sizes)
        prepared.write()
        if hides:
            flight = Flight(lambda: _carry(announcement, prepared), handle.clock.now_s)
            lands_after = step + self._delay_steps
            return _Begun(step, lands_after, prepared, signals, dense_bytes, flight, None)
        with loop.stopwatch.phase("wire"):
            ranks = _signals(announcement)
        prepared.start()
        return _Begun(step, step, prepared, signals, dense_bytes, None, ranks)

    def _sends_all_in_levels(self) -> bool:
        """The warm-up exchanges whole updates, rounded as pruned ones are."""
        is_warmup = self._handle.loop.decision.cause is Cause.WARMUP
        return is_warmup and self._handle.config.warmup == "unpruned"

    def _wait(self, begun: _Begun) -> Ranks:
        if begun.flight is None:
            assert begun.ranks is not None
            return begun.ranks
        stopwatch, clock = self._handle.loop.stopwatch, self._handle.clock
        began_s = clock.now_s()
        with stopwatch.phase("wire"):
            ranks = begun.flight.land()
        exposed_s = clock.now_s() - began_s
        stopwatch.add_hidden(max(0.0, begun.flight.lasted_s - exposed_s))
        return ranks

    def _apply(self, begun: _Begun) -> None:
        """Deliver and commit; all or nothing."""
        handle = self._handle
        bad = handle.inside.union(begun.prepared.deliver(), handle.groups.num_islands)
        if bad:
            begun.prepared.abort()
            refuse(bad, begun.step)
        begun.prepared.commit()

    def _note_pieces(self) -> None:
        """Islands that train different parameters are found before their payloads travel."""
        crc = self._handle.islands.weights.pieces_crc()
        if crc != self._pieces_crc:
            self._pieces_crc = crc
            self._handle.loop.note_weights(crc)

    def _compare_written(self, signals: RankSignals) -> None:
        """Somebody has written weights: all islands must have written the same.

        Raises:
            RankMismatchError: they have not.
        """
        handle = self._handle
        crc = handle.islands.weights.crc()
        announcement = handle.announce(dataclasses.replace(signals, agreement=crc, written=False))
        with handle.loop.stopwatch.phase("wire"):
            handle.weights.check_written(announcement)


def delay_steps(sync_every: int, overlap: str | bool) -> int:
    """Optimizer steps from an exchange to its commit.

    Args:
        sync_every: steps from one exchange to the next.
        overlap: "auto" hides the exchange; False waits for it.
    """
    return max(1, sync_every // 4) if overlap == "auto" else 0


def _signals(announcement: Announcement) -> Ranks:
    return [header.signals for header in announcement.headers()]


def _carry(announcement: Announcement, prepared: Prepared) -> Ranks:
    """What a flight does: agree, let the payloads travel, wait for everybody's."""
    ranks = _signals(announcement)
    prepared.start()
    prepared.wait()
    return ranks
