"""Frozen records that travel between modules. No behaviour beyond derived sizes.

A *bucket* is one flat vector. Its `BucketLayout` cuts it into segments, one per parameter
tensor. A pruned segment is cut into chunks of `CHUNK_NUMEL` consecutive elements (the last one
may be shorter); a dense segment (1-D or small) is always sent whole.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

CHUNK_NUMEL = 4096
"""Elements per chunk: an index inside a chunk fits 12 bits."""

Part = tuple[torch.Tensor, torch.Tensor]
"""What one rank sent of a bucket: distinct positions, int64, and their values, float32."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of consecutive elements of a bucket: one parameter tensor.

    Attributes:
        offset: first element, counted from the start of the bucket.
        numel: number of elements, >= 0.
        pruned: True: chunk-wise top-k; False: every element is sent.
    """

    offset: int
    numel: int
    pruned: bool


@dataclass(frozen=True, slots=True)
class BucketLayout:
    """What lies where in a bucket. Equal on all ranks, equal in every step.

    Attributes:
        segments: in order, without gap or overlap, covering elements 0 .. numel - 1.
        numel: elements of the whole bucket.
    """

    segments: tuple[Segment, ...]
    numel: int

    @property
    def pruned_numel(self) -> int:
        """Elements in pruned segments."""
        return sum(s.numel for s in self.segments if s.pruned)

    @property
    def dense_numel(self) -> int:
        """Elements in segments that are always sent whole."""
        return self.numel - self.pruned_numel


@dataclass(frozen=True, slots=True)
class SparseBlock:
    """What one rank sends of one bucket.

    Rows are the chunks of all pruned segments in order. A row of CHUNK_NUMEL elements keeps
    exactly `k` of them; a shorter last row of t elements keeps ceil(k * t / CHUNK_NUMEL).

    Attributes:
        layout: the bucket's layout.
        k: kept elements per full chunk, 1 .. CHUNK_NUMEL.
        indices: (num_kept,) int16, position inside the row, ascending inside each row. Rows follow
            each other without gap.
        values: (num_kept,) float32, the kept elements.
        dense: (layout.dense_numel,) float32, the dense segments one after the other.
    """

    layout: BucketLayout
    k: int
    indices: torch.Tensor
    values: torch.Tensor
    dense: torch.Tensor


@dataclass(frozen=True, slots=True)
class RankSignals:
    """What one rank measured; rides in its payload header.

    `loss` and the flag belong to the step being exchanged. The times and `wire_bytes` belong to the
    step before it, because a step's own exchange is not over while it travels.

    Attributes:
        loss: training loss of this step, mean over its micro-steps; None: unknown.
        nonfinite: this rank's gradient holds inf or nan.
        compute_time_s: forward, backward and optimizer of the previous step; None: unknown.
        codec_time_s: select, encode, decode of the previous step, seconds.
        comm_time_s: from first send to last receive of the previous step, waiting included.
        wire_bytes: bytes this rank sent in the previous step.
        agreement: running crc of this rank's decisions and parameter hashes; equal on all ranks.
    """

    loss: float | None
    nonfinite: bool
    compute_time_s: float | None
    codec_time_s: float
    comm_time_s: float
    wire_bytes: int
    agreement: int


@dataclass(frozen=True, slots=True)
class StepSignals:
    """The ranks' signals, aggregated in rank order: equal numbers on every rank.

    Attributes:
        step: optimizer step that has just been exchanged, counted from 1.
        loss: mean over ranks; None if some rank knows none or it is not finite.
        nonfinite: some rank's gradient holds inf or nan, or its loss is not finite.
        timed_density: density of the step the times belong to (the previous one); None when the
            times are unknown (the first step, or the first after a resume).
        compute_time_s: maximum over ranks; None when unknown.
        codec_time_s: maximum over ranks.
        comm_time_s: exposed communication: from the arrival of the last rank to the end, so without
            waiting for stragglers; the slowest host governs. See `signals`.
        step_time_s: maximum over ranks of compute + codec + comm; None when unknown.
        wire_bytes: bytes one rank sent in the timed step, maximum over ranks.
        dense_bytes: bytes one rank would have sent in the timed step without pruning; 0: unknown.
        skew_time_s: how long the first to arrive waited for the last; None when unknown.
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


class Cause(str, enum.Enum):
    """Why a decision is what it is. The order is the order of the law."""

    WARMUP = "warmup"
    RAMP = "ramp"
    PERFORMANCE_MISSED = "performance_missed"
    OVER_BUDGET = "over_budget"
    NETWORK_CHANGED = "network_changed"
    BUDGET_ROOM = "budget_room"
    DENSE_CHEAPER = "dense_cheaper"
    HOLD = "hold"
    IDLE = "idle"


@dataclass(frozen=True, slots=True)
class Decision:
    """What the controller wants for one step.

    Attributes:
        step: the step this decision applies to (the one after the signals it was made from).
        density: kept / all in pruned segments, in (0, 1]; a multiple of 1 / CHUNK_NUMEL. 1.0 means
            DeepSpeed's own dense path.
        cause: which rule decided.
        reason: one line for a user, with the numbers behind the decision.
        performance: P(t); None while the window is not full.
        budget_s: the step time budget that was applied, seconds; None while unknown.
        network_changed: the change detector fired on the signals of this decision.
        predicted_step_s: what the model expects of this step, seconds; None: nothing was predicted.
        rate_bytes_per_s: the link's rate as the model sees it; None while unknown.
    """

    step: int
    density: float
    cause: Cause
    reason: str
    performance: float | None
    budget_s: float | None
    network_changed: bool
    predicted_step_s: float | None = None
    rate_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished optimizer step, as this rank saw it: for logs, progress bars and plots.

    Attributes:
        step: the step, counted from 1.
        loss: training loss, mean over micro-steps and ranks; None: unknown or not finite.
        performance: P(t) after this step; None while the window is not full.
        density: kept / all in pruned segments, as used in this step; 1.0: the dense path.
        cause: which rule had set that density.
        step_time_s: compute + codec + comm of this rank; None when the start was not seen.
        compute_time_s: forward, backward and optimizer; None when the start was not seen.
        codec_time_s: select, encode, decode.
        comm_time_s: from first send to last receive, waiting for peers included.
        wire_bytes: bytes this rank sent.
        dense_bytes: bytes this rank would have sent without pruning.
        nonfinite: some rank's gradient or loss was not finite; nothing was sent.
        signals: what the ranks agreed on; the decision was made from it.
        decision: what holds for the next step.
    """

    step: int
    loss: float | None
    performance: float | None
    density: float
    cause: Cause
    step_time_s: float | None
    compute_time_s: float | None
    codec_time_s: float
    comm_time_s: float
    wire_bytes: int
    dense_bytes: int
    nonfinite: bool
    signals: StepSignals
    decision: Decision


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a run.

    Attributes:
        steps: finished optimizer steps.
        wire_bytes: bytes this rank sent.
        dense_bytes: bytes it would have sent without pruning.
        density_min: lowest density of a pruned step; None before the first.
        density_max: highest density of a pruned step; None before the first.
    """

    steps: int = 0
    wire_bytes: int = 0
    dense_bytes: int = 0
    density_min: float | None = None
    density_max: float | None = None
