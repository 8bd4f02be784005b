"""How a run begins on a link that was tried before its first exchange.

With `"warmup": "auto"` the ranks try the link with a small message while the gradients of the first
step wait (`wire.trial`). Where dense exchanges would take far longer than the computation
nothing is ever sent dense: the warm-up is unpruned from step 1, in rounds that the link bears, as
`warmup` says. Else the run begins dense, and what the first exchanges really take decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.law.decision import Decision, every
from ds_gradprune.law.predictive import PredictiveState
from ds_gradprune.law.schedule import next_exchange
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.law.stats import is_time, keep_last
from ds_gradprune.law.warmup import LEAST_S, WarmupState, borne_interval

DEAR = 2.5
"""A dense exchange that takes so many times the computation is never begun. Two of them would end
a dense warm-up as well, see `warmup.MEASURED`."""


def is_open(config: GradientPruningConfig, state: object) -> bool:
    """The form of the warm-up is still to be chosen, and no exchange has been timed.

    Args:
        config: the validated block.
        state: of the law.
    """
    if config.warmup_form != "auto" or not isinstance(state, PredictiveState):
        return False
    return state.warmup == WarmupState() and config.warmup_steps > 0


def begin(
    config: GradientPruningConfig,
    state: PredictiveState,
    decision: Decision,
    ranks: Sequence[RankSignals],
) -> tuple[PredictiveState, Decision] | None:
    """State and decision for step 1 where dense exchanges take far too long; None: they do not.

    Args:
        config: the validated block.
        state: as `start` gave it.
        decision: as `start` gave it.
        ranks: see `law.begin`; the slowest counts.
    """
    computes_s = [rank.compute_time_s for rank in ranks if is_time(rank.compute_time_s)]
    if len(computes_s) < len(ranks) or not all(is_time(rank.comm_time_s) for rank in ranks):
        return None
    compute_s, dense_s = max(computes_s), max(rank.comm_time_s for rank in ranks)
    if dense_s <= DEAR * compute_s or config.warmup_steps * dense_s <= LEAST_S:
        return None
    # A first estimate: two islands send so much less. With more it is too short.
    wire_s = dense_s * config.unpruned_bits / 32
    warm = WarmupState("unpruned", (dense_s,), keep_last((), wire_s, 1), unpruned=True)
    interval = borne_interval(config, warm, (compute_s,)) or 1
    first = next_exchange(config, 0, interval, unpruned=True)
    text = (
        f"warm-up step {first} of {config.warmup_steps}: unpruned, {every(1, interval)}, as a "
        f"dense exchange would take {dense_s:.3g} s beside {compute_s:.3g} s of computation"
    )
    begun = state._replace(
        warmup=warm, interval=interval, compute_times_s=keep_last((), compute_s, 1)
    )
    return begun, dataclasses.replace(
        decision, step=first, interval=interval, unpruned=True, reason=text
    )
