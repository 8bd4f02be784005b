"""Counts steps, measures them, and decides what the next exchange may send.

The loop does not know what is exchanged, nor how: an algorithm and a channel do that. It gives the
rank's signals for the headers, takes back the headers of all ranks, and asks the law. What decides
travelled in the headers, so every rank decides from the same numbers. All functions are local.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds_gradprune import law
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import CheckpointError
from ds_gradprune.law.consensus import aggregate
from ds_gradprune.law.decision import Decision
from ds_gradprune.law.signals import RankSignals, StepSignals
from ds_gradprune.law.state import from_plain, to_plain
from ds_gradprune.train.loop_state import LoopState, Timed
from ds_gradprune.train.report import StepReport, Totals
from ds_gradprune.train.stopwatch import Stopwatch

FORMAT = 5
"""Of the state in a checkpoint."""


class Loop:
    """The step loop of one rank.

    Args:
        config: the validated block.
        clock: seconds, monotonic; a virtual one in tests.

    Attributes:
        stopwatch: where the time goes.
        decision: what holds for the exchange that is next or under way.
        step: finished optimizer steps.
        last_exchange: the step that the last exchange, finished or not, followed.
        totals: sums over the run.
        report: the last exchange; None before the first.
    """

    def __init__(self, config: GradientPruningConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self.stopwatch = Stopwatch(clock)
        self.step = self.last_exchange = self._reported = self._measured = self._agreement = 0
        self._has_stepped = self._is_tried = False
        self.totals = Totals()
        self.report: StepReport | None = None
        self._timed: Timed | None = None
        self._law, self.decision = law.start(config)

    def restart(self) -> None:
        """As before the first step: nothing is known."""
        empty = Stopwatch(lambda: 0.0).state_dict()
        self._is_tried = False
        self.take(LoopState(0, 0, 0, 0, 0, *law.start(self._config), None, Totals(), empty))

    @property
    def exchange_step(self) -> int:
        """The step under way, which an exchange in it follows; counted from 1."""
        return self.step + 1

    @property
    def is_due(self) -> bool:
        """An exchange of updates begins after the step under way."""
        return self.exchange_step - self.last_exchange >= self.interval

    @property
    def interval(self) -> int:
        """Optimizer steps from the last exchange to the one that is next or under way."""
        every = self._config.sync_every
        if every == "auto" or self.decision.unpruned:
            return self.decision.interval
        return every

    @property
    def delay_steps(self) -> int:
        """Optimizer steps from the exchange that is next or under way to its commit."""
        if self.decision.density == 1.0 and not self.decision.unpruned:
            return 0
        return self._config.delay_of(self.interval, unpruned=self.decision.unpruned)

    @property
    def asks_for_trial(self) -> bool:
        """Before its first exchange the run wants to know the link."""
        return not (self.step or self._is_tried) and law.asks_for_trial(self._config, self._law)

    def begin(self, ranks: Sequence[RankSignals]) -> bool:
        """The link was tried before the first exchange: decide how the run begins.

        Args:
            ranks: what all ranks said, see `law.begin`.

        Returns:
            Something other was decided than before.
        """
        self._is_tried, before = True, self.decision
        self._law, self.decision = law.begin(self._config, self._law, before, ranks)
        self._agree_on(self.decision)
        return self.decision != before

    def begin_step(self) -> None:
        """The step's first forward begins; further calls in the same step change nothing."""
        self.stopwatch.start()

    def stepped(self) -> None:
        """The optimizer has stepped in the step under way."""
        self._has_stepped = True

    def begin_exchange(self) -> None:
        """An exchange follows the step under way, whose optimizer has stepped."""
        self.stepped()
        self.last_exchange = self.exchange_step

    def end_step(self) -> None:
        """The optimizer has stepped, and whatever exchange there was has begun or is over."""
        self.stopwatch.pause()
        self.step += 1
        self._has_stepped = False

    def signals(
        self, loss: float | None, *, nonfinite: bool = False, written: bool = False
    ) -> RankSignals:
        """What this rank says in the headers of the exchange under way.

        Args:
            loss: training loss, mean over this rank's micro-steps since the last exchange.
            nonfinite: this rank's gradients or weights hold inf or nan.
            written: somebody else has written this rank's weights.
        """
        timed = self._timed
        return RankSignals(
            loss=loss,
            nonfinite=nonfinite,
            compute_time_s=None if timed is None else timed.compute_time_s,
            codec_time_s=0.0 if timed is None else timed.codec_time_s,
            comm_time_s=0.0 if timed is None else timed.comm_time_s,
            wire_bytes=0 if timed is None else timed.wire_bytes,
            agreement=self._agreement,
            written=written,
            hidden_time_s=0.0 if timed is None else timed.hidden_time_s,
        )

    def finish_exchange(
        self,
        ranks: Sequence[RankSignals],
        *,
        wire_bytes: int,
        dense_bytes: int,
        senders: int | None = None,
    ) -> StepReport:
        """The exchange that was begun is over: decide for the next one.

        Args:
            ranks: what all ranks said, in rank order; equal everywhere.
            wire_bytes: sent by this rank since the last exchange.
            dense_bytes: what it would have sent without pruning.
            senders: ranks whose payloads came; None: as many as have said something.

        Returns:
            What the exchange was, and what holds next.
        """
        used, before, step = self.decision, self._timed, self.last_exchange
        times, is_seen = self.stopwatch.lap()
        finished = self.step + self._has_stepped
        timed = Timed(
            used.density,
            max(1, finished - self._measured),
            self.delay_steps,
            times.compute_s if is_seen else None,
            times.codec_s,
            times.wire_s + times.hidden_s,
            times.hidden_s if self._config.prune == "gradient" else 0.0,
            wire_bytes,
            dense_bytes,
            used.unpruned,
        )
        signals = self._aggregate(step, ranks, before)
        self._law, self.decision = law.update(self._config, self._law, signals)
        steps, self._reported = step - self._reported, step
        self._timed, self._measured = timed, finished
        self._agree_on(self.decision)
        self.report = StepReport(
            step=step,
            steps=steps,
            loss=signals.loss,
            performance=self.decision.performance,
            density=used.density,
            cause=used.cause,
            step_time_s=times.wall_s if is_seen else None,
            compute_time_s=timed.compute_time_s,
            codec_time_s=times.codec_s,
            comm_time_s=times.wire_s,
            hidden_time_s=times.hidden_s,
            wire_bytes=wire_bytes,
            dense_bytes=dense_bytes,
            nonfinite=signals.nonfinite,
            signals=signals,
            decision=self.decision,
            senders=len(ranks) if senders is None else senders,
        )
        self.totals = self.totals.plus(self.report)
        return self.report

    def note_learning(self, time: float) -> None:
        """Fold the learning-rate time of the round into what the next headers compare."""
        self._agree(struct.pack("<d", time))

    def note_weights(self, crc: int) -> None:
        """Fold a hash of the weights into what the next headers compare.

        A rank whose weights differ is found by all ranks in the next exchange.
        """
        self._agree(struct.pack("<I", crc))

    # ---- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that affects the next step, as plain types."""
        return {
            "format": FORMAT,
            "prune": self._config.prune,
            "step": self.step,
            "last_exchange": self.last_exchange,
            "reported": self._reported,
            "measured": self._measured,
            "agreement": self._agreement,
            "law": law.to_plain(self._law),
            "decision": to_plain(self.decision),
            "timed": None if self._timed is None else to_plain(self._timed),
            "totals": to_plain(self.totals),
            "stopwatch": self.stopwatch.state_dict(),
        }

    def read(self, state: Mapping[str, Any]) -> LoopState:
        """The state that `state_dict` wrote; changes nothing.

        Raises:
            CheckpointError: it is of another format or mode, or is none.
        """
        for key, own in (("format", FORMAT), ("prune", self._config.prune)):
            if state.get(key) != own:
                raise CheckpointError(
                    f"the pruning state's {key} must be {own!r}, got {state.get(key)!r}. Resume "
                    "with the release and the configuration that saved it."
                )
        timed = state["timed"]
        return LoopState(
            int(state["step"]),
            int(state["last_exchange"]),
            int(state["reported"]),
            int(state["measured"]),
            int(state["agreement"]),
            law.restore(self._config, state["law"]),
            from_plain(Decision, state["decision"]),
            None if timed is None else from_plain(Timed, timed),
            from_plain(Totals, state["totals"]),
            state["stopwatch"],
        )

    def take(self, state: LoopState) -> None:
        """Continue from a state; its report is not kept."""
        self.step, self.last_exchange = state.step, state.last_exchange
        self._reported, self._measured = state.reported, state.measured
        self._agreement = state.agreement
        self._law, self.decision = state.law, state.decision
        self._timed, self.totals = state.timed, state.totals
        self.stopwatch.load_state_dict(state.stopwatch)
        self.report = None

    # ---- details -------------------------------------------------------------------------------

    def _agree(self, data: bytes) -> None:
        self._agreement = zlib.crc32(data, self._agreement)

    def _agree_on(self, decided: Decision) -> None:
        self._agree(
            struct.pack("<IdI?", decided.step, decided.density, decided.interval, decided.unpruned)
        )

    def _aggregate(
        self, step: int, ranks: Sequence[RankSignals], before: Timed | None
    ) -> StepSignals:
        """What all ranks said as one record; the times are of the exchange before."""
        if before is None:
            return aggregate(step, ranks, None, 0)
        share = min(1.0, before.hide_steps / before.steps)
        return aggregate(
            step,
            ranks,
            before.density,
            before.dense_bytes,
            share,
            interval=before.steps,
            unpruned=before.unpruned,
        )
