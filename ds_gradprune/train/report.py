"""What is told of a finished step, and the sums over a run."""

from __future__ import annotations

from dataclasses import dataclass

from ds_gradprune.law.decision import Cause, Decision
from ds_gradprune.law.signals import StepSignals


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished exchange, as this rank saw it: for logs, progress bars and plots.

    Attributes:
        step: the optimizer step that it followed, counted from 1.
        steps: optimizer steps since the exchange before, this one included.
        loss: training loss, mean over micro-steps and ranks; None: unknown or not finite.
        performance: P(t) after this step; None while the window is not full.
        density: kept / all in pruned segments, as used in this step; 1.0: the dense path.
        cause: which rule had set that density.
        step_time_s: compute + codec + wire of this rank since the exchange before, so the wall
            clock of its steps; None when the start was not seen.
        compute_time_s: forward, backward, optimizer; None when the start was not seen.
        codec_time_s: select, encode, decode, apply.
        comm_time_s: waiting for the exchange, so for the link and for peers.
        hidden_time_s: of the exchange, while the computation went on.
        wire_bytes: bytes this rank sent.
        dense_bytes: bytes this rank would have sent without pruning.
        nonfinite: some rank's gradient, weight or loss was not finite; nothing was applied.
        signals: what the ranks agreed on; the decision was made from it.
        decision: what holds for the next exchange.
        senders: ranks, with islands one of each, that took part.
    """

    step: int
    steps: int
    loss: float | None
    performance: float | None
    density: float
    cause: Cause
    step_time_s: float | None
    compute_time_s: float | None
    codec_time_s: float
    comm_time_s: float
    hidden_time_s: float
    wire_bytes: int
    dense_bytes: int
    nonfinite: bool
    signals: StepSignals
    decision: Decision
    senders: int


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a run.

    Attributes:
        steps: finished optimizer steps.
        wire_bytes: bytes this rank sent.
        dense_bytes: bytes it would have sent without pruning.
        density_min: lowest density of a pruned exchange; None before the first.
        density_max: highest density of a pruned exchange; None before the first.
    """

    steps: int = 0
    wire_bytes: int = 0
    dense_bytes: int = 0
    density_min: float | None = None
    density_max: float | None = None

    def plus(self, report: StepReport) -> Totals:
        """With one more exchange."""
        low, high = self.density_min, self.density_max
        if report.density < 1.0:
            low = report.density if low is None else min(low, report.density)
            high = report.density if high is None else max(high, report.density)
        return Totals(
            steps=report.step,
            wire_bytes=self.wire_bytes + report.wire_bytes,
            dense_bytes=self.dense_bytes + report.dense_bytes,
            density_min=low,
            density_max=high,
        )
