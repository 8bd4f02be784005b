"""All ranks' signals as one record. The same numbers on every rank, whoever computes them.

**A straggler is not the wire.** The ranks leave one exchange together and reach the next one when
their own computation is done, so how much later the last one arrives (the skew) shows in the
computation times. A rank's exchange lasts from its own arrival to the end. Counted from the last
arrival, the rest is the wire:

    exposed = max over ranks of (compute + codec + exchange) - max over ranks of (compute + codec)

It is at least the exchange of the last to arrive, which waits for nobody, and the slowest host
governs it.

**Nothing may be half known.** What is missing on one rank (a loss, a computation time) counts as
missing on all, so no rank decides from numbers that another one lacks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ds_gradprune.law.signals import RankSignals, StepSignals


def aggregate(
    step: int,
    ranks: Sequence[RankSignals],
    timed_density: float | None,
    dense_bytes: int,
    hidden_share: float = 0.0,
    interval: int = 1,
    unpruned: bool = False,
) -> StepSignals:
    """All ranks' signals of one step as one record.

    Args:
        step: the step that was exchanged, counted from 1.
        ranks: what arrived in the headers, in rank order, at least one.
        timed_density: density of the exchange before, to which the times belong; None: there was
            none.
        dense_bytes: what one rank would have sent in the exchange before without pruning.
        hidden_share: an exchange travels during this share of the computation.
        interval: optimizer steps behind the times.
        unpruned: the exchange before was an unpruned one.

    Returns:
        The record; equal on all ranks, since all have the same headers.
    """
    loss, is_finite = _mean_loss(ranks)
    times = None if timed_density is None else _times(ranks, hidden_share)
    return StepSignals(
        step=step,
        loss=loss,
        nonfinite=not is_finite or any(rank.nonfinite for rank in ranks),
        timed_density=None if times is None else timed_density,
        compute_time_s=None if times is None else times.compute_s,
        codec_time_s=max(rank.codec_time_s for rank in ranks),
        comm_time_s=min(rank.comm_time_s for rank in ranks) if times is None else times.exposed_s,
        step_time_s=None if times is None else times.step_s,
        wire_bytes=max(rank.wire_bytes for rank in ranks),
        dense_bytes=0 if times is None else dense_bytes,
        skew_time_s=None if times is None else times.skew_s,
        interval=interval,
        timed_unpruned=unpruned and times is not None,
        hidden_time_s=0.0 if times is None else times.hidden_s,
    )


def _mean_loss(ranks: Sequence[RankSignals]) -> tuple[float | None, bool]:
    """The mean loss, or None if some rank's is not known or not finite; all that is known is."""
    losses = [rank.loss for rank in ranks if rank.loss is not None]
    if not all(map(math.isfinite, losses)):
        return None, False
    if len(losses) < len(ranks):
        return None, True
    # fsum, since `sum` rounds differently from Python 3.12 on; divided first, so none overflows.
    return math.fsum(loss / len(losses) for loss in losses), True


class _Times(NamedTuple):
    """Of the exchange before, over all ranks."""

    compute_s: float
    exposed_s: float
    step_s: float
    skew_s: float
    hidden_s: float


def _times(ranks: Sequence[RankSignals], hidden_share: float) -> _Times | None:
    """None if some rank does not know how long it computed."""
    computes_s = [rank.compute_time_s for rank in ranks if rank.compute_time_s is not None]
    if len(computes_s) < len(ranks):
        return None
    ready_s = [c + rank.codec_time_s for c, rank in zip(computes_s, ranks, strict=True)]
    step_s = max(r + rank.comm_time_s for r, rank in zip(ready_s, ranks, strict=True))
    shortest_s = min(rank.comm_time_s for rank in ranks)
    exposed_s = max(shortest_s, step_s - max(ready_s))
    hidden_s = min(exposed_s, min(rank.hidden_time_s for rank in ranks))
    step_s -= max(hidden_s, min(exposed_s, hidden_share * max(computes_s)))
    return _Times(max(computes_s), exposed_s, step_s, max(ready_s) - min(ready_s), hidden_s)
