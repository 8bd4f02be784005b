"""The exchange that ends a round of an island: waited for at once, or hidden behind the next steps.

    step t0      prepare and write the payloads; announce
    t0 .. t0+d   they travel while the island trains on (with `overlap`; else d is 0)
    step t0 + d  deliver and commit; the law decides

The delay d follows from the interval in force, not from when the bytes arrive, so all islands apply
an exchange after the same step. Whoever needs the shared weights earlier lands it earlier. They
take the same values then, because nothing else moves them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds_gradprune.errors import TransportError
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.train.flight import Flight
from ds_gradprune.train.islands import Prepared, refuse
from ds_gradprune.train.learning_time import learning_time_of
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
        signals: what this island said.
        dense_bytes: what it would have sent without pruning.
        prepared: its payloads; None: they could not be sent.
        flight: carries it; None: it was waited for.
        ranks: what all islands said, if it was waited for.
        error: why the payloads could not be sent.
        goes_ahead: own weights move when it begins, see `train.pruned`; the same on all ranks,
            whatever happens to one of them.
    """

    step: int
    lands_after: int
    signals: RankSignals
    dense_bytes: int
    prepared: Prepared | None = None
    flight: Flight[Ranks] | None = None
    ranks: Ranks | None = None
    error: Exception | None = None
    goes_ahead: bool = False


class Rounds:
    """Begins and lands the exchanges of one engine.

    Args:
        handle: the engine's handle.
    """

    def __init__(self, handle: IslandHandle) -> None:
        self._handle = handle
        self._begun: _Begun | None = None
        self._pieces_crc = 0
        self._learning = learning_time_of(handle.islands.rule)

    def end_step(self, rates: Sequence[float] = ()) -> None:
        """The optimizer has stepped: land what is due, begin what is due. Collective.

        Args:
            rates: learning rates that it has stepped with, one per group of parameters.
        """
        loop = self._handle.loop
        if self._learning is not None:
            self._learning.end_step(rates)
        loop.stepped()
        has_moved = False
        if self._begun is not None and loop.exchange_step >= self._begun.lands_after:
            has_moved = self._land(publishes=False)
        if loop.is_due:
            has_moved |= self._land(publishes=False)
            with loop.stopwatch.phase("codec"):
                self._begun = self._begin()
            has_moved |= self._begun.goes_ahead
        if has_moved:
            with loop.stopwatch.phase("codec"):
                self._handle.shards.publish()
        if self._begun is not None and self._begun.flight is None:
            self.land()
        loop.end_step()

    def land(self) -> None:
        """Apply the exchange under way, if there is one, and decide. Collective: the island.

        Raises:
            NonFiniteError: some island's weights hold inf or nan, on all ranks alike.
            TransportError, WireFormatError, RankMismatchError: the exchange failed. Nothing has
                moved, in any of these cases.
        """
        self._land(publishes=True)

    def state_dict(self) -> dict[str, Any]:
        """What affects the next exchange; nothing may be under way. Local."""
        assert self._begun is None
        learning = None if self._learning is None else self._learning.state_dict()
        return {"pieces_crc": self._pieces_crc, "learning": learning}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Local."""
        self._begun = None
        self._pieces_crc = int(state["pieces_crc"])
        if self._learning is not None:
            self._learning.load_state_dict(state["learning"])

    def _land(self, *, publishes: bool) -> bool:
        """The same; the model may have to take the own weights later. Whether there was one."""
        begun, self._begun = self._begun, None
        if begun is None:
            return False
        handle = self._handle
        with handle.loop.stopwatch.phase("codec"):
            ranks, wire_bytes = self._apply(begun)
            if publishes:
                handle.shards.publish()
        handle.finish(ranks, wire_bytes=wire_bytes, dense_bytes=begun.dense_bytes)
        return True

    def _begin(self) -> _Begun:
        handle = self._handle
        islands, loop = handle.islands, handle.loop
        self._note_pieces()
        loop.begin_exchange()
        step = loop.last_exchange
        if self._learning is not None:
            loop.note_learning(self._learning.end_round())
        is_dense = loop.decision.density == 1.0 and not loop.decision.unpruned
        signals = loop.signals(
            handle.losses.take(),
            nonfinite=is_dense and not islands.weights.is_finite(),
            written=bool(handle.weights.written),
        )
        signals, dense_bytes = handle.inside.agree(handle.asking(signals), islands.dense_bytes())
        pruned = loop.decision.density < 1.0
        hides = pruned and loop.delay_steps > 0
        goes_ahead = hides and islands.kept is None
        begun = _Begun(step, step, signals, dense_bytes, goes_ahead=goes_ahead)
        try:
            return self._send_dense(begun) if is_dense else self._send(begun)
        except Exception as exc:  # told to the island's other ranks when it is landed
            return dataclasses.replace(begun, error=exc)

    def _send_dense(self, begun: _Begun) -> _Begun:
        handle = self._handle
        announcement = handle.announce(begun.signals)
        with handle.loop.stopwatch.phase("wire"):
            ranks = _signals(announcement)
        bad = [island for island, rank in enumerate(ranks) if rank.nonfinite]
        prepared = handle.islands.prepare_dense(bad)
        prepared.start()
        return dataclasses.replace(begun, prepared=prepared, ranks=ranks)

    def _send(self, begun: _Begun) -> _Begun:
        handle = self._handle
        # Its own interval counts: the next one may be another, but is at least half as long.
        delay_steps = handle.loop.delay_steps
        hides = delay_steps > 0
        prepared = handle.islands.prepare(
            handle.k,
            step=begun.step,
            signals=begun.signals,
            hides=hides,
            unscaled=handle.loop.decision.unpruned,
        )
        announcement = handle.announce(begun.signals, prepared.sizes)
        prepared.write()
        if hides:
            flight = Flight(lambda: _carry(announcement, prepared), handle.clock.now_s)
            lands_after = begun.step + delay_steps
            return dataclasses.replace(
                begun, prepared=prepared, flight=flight, lands_after=lands_after
            )
        with handle.loop.stopwatch.phase("wire"):
            ranks = _signals(announcement)
        prepared.start()
        return dataclasses.replace(begun, prepared=prepared, ranks=ranks)

    def _apply(self, begun: _Begun) -> tuple[Ranks, int]:
        """Deliver and commit; all or nothing.

        Returns:
            What all islands said, and the bytes that this one has sent.
        """
        handle = self._handle
        ranks, bad, error = Ranks(), list[int](), begun.error
        if error is None:
            try:
                ranks, bad = self._deliver(begun)
            except Exception as exc:
                error = exc
        sent = handle.channel.take_wire_bytes()
        try:
            bad, sent = handle.inside.outcome(error=error, bad=bad, wire_bytes=sent)
            refuse(bad, begun.step)
        except Exception as exc:
            if begun.prepared is not None:
                begun.prepared.abort()
            # Where the island's own ranks may be out of reach, nothing can be published.
            is_alone = handle.groups.num_shards == 1
            if begun.goes_ahead and (is_alone or not isinstance(exc, TransportError)):
                handle.shards.publish()
            handle.weights.note()  # what was taken back is no write of somebody else
            raise
        assert begun.prepared is not None
        begun.prepared.commit()
        return ranks, sent

    def _deliver(self, begun: _Begun) -> tuple[Ranks, list[int]]:
        """Wait for all islands: what they said, and which of them are sick."""
        ranks = self._wait(begun)
        if any(rank.written for rank in ranks):
            self._compare_written(begun.signals)
        assert begun.prepared is not None
        return ranks, begun.prepared.deliver()

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


def _signals(announcement: Announcement) -> Ranks:
    return [header.signals for header in announcement.headers()]


def _carry(announcement: Announcement, prepared: Prepared) -> Ranks:
    """What a flight does: agree, let the payloads travel, wait for everybody's."""
    ranks = _signals(announcement)
    prepared.start()
    prepared.wait()
    return ranks
