"""What a loop measured last, and everything of it that a checkpoint holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ds_gradprune import law
from ds_gradprune.law.decision import Decision
from ds_gradprune.train.report import Totals


@dataclasses.dataclass(frozen=True, slots=True)
class Timed:
    """What this rank measured in its last exchange; rides in the next one's headers.

    Attributes:
        density: kept / all, as used.
        steps: optimizer steps whose computation was measured with it.
        hide_steps: it may have travelled while so many of them were computed.
        compute_time_s: None: not seen from its start.
        codec_time_s: select, encode, decode, apply.
        comm_time_s: of the exchange, hidden or not.
        hidden_time_s: of that, what hid, where it cannot be known from `hide_steps`.
        wire_bytes: sent by this rank.
        dense_bytes: what it would have sent without pruning.
        unpruned: it sent everything, in few bits.
    """

    density: float
    steps: int
    hide_steps: int
    compute_time_s: float | None
    codec_time_s: float
    comm_time_s: float
    hidden_time_s: float
    wire_bytes: int
    dense_bytes: int
    unpruned: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class LoopState:
    """Everything of a loop that affects the next step.

    Attributes:
        step: finished optimizer steps.
        last_exchange: the step that the last exchange followed; 0: none yet.
        reported: the step that the last finished exchange followed.
        measured: steps that were finished when it was.
        agreement: running crc of decisions and of hashes of the weights.
        law: state of the law.
        decision: what holds for the next exchange.
        timed: see there; None before the first exchange.
        totals: sums over the run.
        stopwatch: of the interval under way.
    """

    step: int
    last_exchange: int
    reported: int
    measured: int
    agreement: int
    law: law.State
    decision: Decision
    timed: Timed | None
    totals: Totals
    stopwatch: Mapping[str, Any]
