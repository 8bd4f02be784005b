"""What ranks measure, and what they all know once their headers have arrived."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankSignals:
    """What one rank measured; rides in its payload header.

    `loss` and the flags belong to the step being exchanged. The times and `wire_bytes` belong to
    the exchange before it, because an exchange is not over while it travels.

    Attributes:
        loss: training loss of this step, mean over its micro-steps; None: unknown.
        nonfinite: this rank's gradient holds inf or nan.
        compute_time_s: forward, backward and optimizer before the previous exchange; None: unknown.
        codec_time_s: select, encode, decode of the previous exchange, seconds.
        comm_time_s: from first send to last receive of the previous exchange, waiting included.
        wire_bytes: bytes this rank sent in the previous exchange.
        agreement: running crc of this rank's decisions and parameter hashes; equal on all ranks.
        written: somebody other than the optimizer has written this rank's weights.
        stops: this rank was asked to end the run.
        asks: this rank has seen another one that asks to take part.
        hidden_time_s: of `comm_time_s`, while the computation went on, as measured. 0.0 where the
            steps that an exchange travels through are known, or nothing hides.
    """

    loss: float | None
    nonfinite: bool
    compute_time_s: float | None
    codec_time_s: float
    comm_time_s: float
    wire_bytes: int
    agreement: int
    written: bool = False
    stops: bool = False
    asks: bool = False
    hidden_time_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepSignals:
    """The ranks' signals as one record, equal on every rank; `consensus.aggregate` makes it.

    Attributes:
        step: optimizer step that has just been exchanged, counted from 1.
        loss: mean over ranks; None if some rank knows none or it is not finite.
        nonfinite: some rank's gradient holds inf or nan, or its loss is not finite.
        timed_density: density of the exchange the times belong to (the previous one); None when the
            times are unknown (the first exchange, or the first after a resume).
        compute_time_s: maximum over ranks; None when unknown.
        codec_time_s: maximum over ranks.
        comm_time_s: exposed communication: from the arrival of the last rank to the end, so without
            waiting for stragglers; the slowest host governs.
        step_time_s: maximum over ranks of compute + codec + comm; None when unknown.
        wire_bytes: bytes one rank sent in the timed exchange, maximum over ranks.
        dense_bytes: bytes one rank would have sent in it without pruning; 0: unknown.
        skew_time_s: how long the first to arrive waited for the last; None when unknown.
        interval: optimizer steps whose times these are; they are sums over them.
        timed_unpruned: the exchange the times belong to was an unpruned one, not a dense one.
        hidden_time_s: of `comm_time_s`, while the computation went on: minimum over ranks.
    """

    step: int
    loss: float | None
    nonfinite: bool
    timed_density: float | None
    compute_time_s: float | None
    codec_time_s: float
    comm_time_s: float
    step_time_s: float | None
    wire_bytes: int
    dense_bytes: int
    skew_time_s: float | None = None
    interval: int = 1
    timed_unpruned: bool = False
    hidden_time_s: float = 0.0
