"""What all ranks measured, as one record. Pure: the same numbers on every rank, whoever computes.

**A straggler is not the wire.** The ranks leave one exchange together and reach the next one when
their own computation is done, so how much later the last one arrives (the skew) shows in the
computation times. A rank's exchange lasts from its own arrival to the end; counted from the last
arrival, the rest is the wire:

    exposed = max over ranks of (compute + codec + exchange) - max over ranks of (compute + codec)

It is at least the exchange of the last to arrive, who waits for nobody, and the slowest host
governs it.

**Nothing may be half known.** What is missing on one rank (a loss, a computation time) counts as
missing on all, so no rank decides from numbers that another one lacks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ds_gradprune.records import RankSignals, StepSignals


def aggregate(
    step: int, ranks: Sequence[RankSignals], timed_density: float | None, dense_bytes: int
) -> StepSignals:
    """All ranks' signals of one step as one record. Local.

    Args:
        step: the step that was exchanged, counted from 1.
        ranks: what arrived in the headers, in rank order, at least one.
        timed_density: density of the step before, to which the times belong; None: there was none.
        dense_bytes: what one rank would have sent in the step before without pruning.

    Returns:
        The record; equal on all ranks, since all have the same headers.
    """
    losses = [rank.loss for rank in ranks if rank.loss is not None]
    finite = all(math.isfinite(loss) for loss in losses)
    complete = len(losses) == len(ranks) and finite
    compute_s = [rank.compute_time_s for rank in ranks if rank.compute_time_s is not None]
    known = timed_density is not None and len(compute_s) == len(ranks)
    step_s = skew_s = None
    exposed_s = min(rank.comm_time_s for rank in ranks)
    if known:
        ready_s = [c + rank.codec_time_s for c, rank in zip(compute_s, ranks, strict=True)]
        step_s = max(r + rank.comm_time_s for r, rank in zip(ready_s, ranks, strict=True))
        exposed_s = max(exposed_s, step_s - max(ready_s))
        skew_s = max(ready_s) - min(ready_s)
    return StepSignals(
        step=step,
        loss=sum(losses) / len(losses) if complete else None,
        nonfinite=not finite or any(rank.nonfinite for rank in ranks),
        timed_density=timed_density if known else None,
        compute_time_s=max(compute_s) if known else None,
        codec_time_s=max(rank.codec_time_s for rank in ranks),
        comm_time_s=exposed_s,
        step_time_s=step_s,
        wire_bytes=max(rank.wire_bytes for rank in ranks),
        dense_bytes=dense_bytes if known else 0,
        skew_time_s=skew_s,
    )
