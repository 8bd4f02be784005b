"""What the step time budget affords, and when the density moves there.

The density moves

- down when the model, with 0.8 standard deviations, is over budget,
- up when at least a quarter more fits,
- to dense when a dense step fits the budget or is faster than what pruning offers, unless
  density.min = density.max pins the density,

at once after a change of the network, otherwise after a handful of steps at a density. Where an
exchange comes every H steps, H times fewer of them are waited for, but as many as it takes to see
anything at all: 2 to fall, 3 to rise, 6 to refine.
"""

from __future__ import annotations

from typing import NamedTuple

from ds_gradprune.bucket.layout import CHUNK_NUMEL, kept_per_chunk
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.law import link_cost
from ds_gradprune.law.decision import Cause, Choice, Interval, KeptElements
from ds_gradprune.law.network import UP_STEPS, Network
from ds_gradprune.law.prices import Prices
from ds_gradprune.law.schedule import patience
from ds_gradprune.law.stats import Change, Count, clamp

UP_SHARE = 1.25
"""So many times the density must fit before it rises: the dead band."""

UP_SHARE_CHANGED, UP_SHARE_REFINED = 1.1, 1.08
"""The same after a change of the network, and once after a move, when a whole window of exchanges
has made the estimate better."""

SOON_STEPS, UP_SHARE_SOON = 3, 1.5
"""Exchanges after a move that suffice to rise again, if so much more fits: it was too timid."""

REFINE_STEPS = 2 * link_cost.WINDOW_STEPS
"""Within so many steps after a move the plan may be refined."""

REFINE_LEAST = 6
"""Exchanges behind a refinement where they are rare."""

DOWN_MARGIN = 0.8
"""Standard deviations: the density falls when fewer than these are left to the budget."""

WRONG_STEPS = 2
"""Exchanges after a move that suffice when the budget is plainly missed: the move was too bold."""

DOWN_STEPS = 5
"""Steps at a density before it falls without a change of the network."""

CHEAPER = 0.95
"""Dense must take less than this share of a pruned step to be called cheaper."""


class PlanState(NamedTuple):
    """Where the plan stands.

    Attributes:
        k: kept elements per chunk that the budget affords; CHUNK_NUMEL: dense.
        steps: exchanges since it moved.
        is_refined: its last move was a small rise. The exchanges before it are about as large, so
            they count as evidence, and there is nothing left to refine.
        interval: optimizer steps from one exchange to the next.
    """

    k: KeptElements
    steps: Count = UP_STEPS
    is_refined: bool = False
    interval: Interval = 1

    def at(self, interval: int) -> PlanState:
        """The state at another interval."""
        return self if interval == self.interval else self._replace(interval=interval)

    def after(self, choice: Choice) -> PlanState:
        """The state once a choice is in force."""
        if choice.cause is Cause.HOLD:
            return PlanState(choice.k, self.steps + 1, self.is_refined, self.interval)
        if choice.interval is not None:
            return PlanState(choice.k, 0, False, choice.interval)
        return PlanState(choice.k, 0, 1.0 <= choice.k / self.k < UP_SHARE, self.interval)


class _View(NamedTuple):
    """Everything that the rules look at.

    Attributes:
        k: where the plan stands.
        best: the highest k that the budget affords, dense aside.
        prices: what a step costs.
        budget_s: what it may cost.
        is_own: the user has given it.
        now_s: a step where the plan stands.
        dense_s: a dense step.
        k_min: least k.
        has_dense: dense is a way: the user allows more than one density, and no interval that the
            law has chosen says that there is little room.
        change: how the network has just changed.
        may_fall: enough is known to prune more.
        may_rise: enough is known to prune less.
        share: so many times k must fit before it rises.
    """

    k: int
    best: int
    prices: Prices
    budget_s: float
    is_own: bool
    now_s: float
    dense_s: float
    k_min: int
    has_dense: bool
    change: Change | None
    may_fall: bool
    may_rise: bool
    share: float

    @property
    def budget(self) -> str:
        """The budget for a user."""
        return f"{'a' if self.is_own else 'an automatic'} budget of {self.budget_s:.3f} s"

    @property
    def is_over(self) -> bool:
        """The plan does not leave enough to the budget."""
        return not self.prices.fits(self.k, self.budget_s, DOWN_MARGIN)


def choose(
    config: GradientPruningConfig,
    state: PlanState,
    network: Network,
    prices: Prices | None,
    budget_s: float | None,
    *,
    is_guarded: bool,
) -> Choice:
    """Where the plan goes.

    Args:
        config: the validated block.
        state: where it stands.
        network: what is known of the exchanges.
        prices: what a step costs; None while unknown.
        budget_s: what a step may take; None while unknown.
        is_guarded: nothing but a change of the network may prune more.

    Returns:
        With cause HOLD and the reason why where it stays.
    """
    k_min, k_max = kept_per_chunk(config.density.min), kept_per_chunk(config.density.max)
    k = state.k if state.k == CHUNK_NUMEL else clamp(state.k, k_min, k_max)
    if prices is None or network.cost is None or budget_s is None:
        return Choice(k, Cause.HOLD, "no exchange was timed")
    now_s = prices.step_s(k)
    known = evidence(state, network)
    view = _View(
        k,
        prices.affordable_k(budget_s, k_min, k_max),
        prices,
        budget_s,
        config.step_time_budget_s is not None,
        now_s,
        prices.step_s(CHUNK_NUMEL),
        k_min,
        k_min < k_max and state.interval <= config.first_interval,
        network.change,
        _may_fall(state, network, known, is_late=now_s > budget_s, is_guarded=is_guarded),
        may_rise(state, network, known),
        _share(state, network, known),
    )
    if k == CHUNK_NUMEL:
        return _from_dense(view)
    return _to_dense(view) or _down(view) or _up(view) or _stay(view)


def inside(config: GradientPruningConfig, k: int) -> int:
    """A plan from a checkpoint may lie outside bounds that were changed since."""
    return (
        k
        if k == CHUNK_NUMEL
        else max(kept_per_chunk(config.density.min), min(kept_per_chunk(config.density.max), k))
    )


# ---- what is known well enough -------------------------------------------------------------------


def evidence(state: PlanState, network: Network) -> int:
    """Exchanges of about this size that speak for or against a move; the cost is known."""
    assert network.cost is not None
    samples = network.cost.samples
    return samples if state.is_refined else min(samples, state.steps)


def _may_fall(
    state: PlanState, network: Network, known: int, *, is_late: bool, is_guarded: bool
) -> bool:
    if network.change is not None:
        return True
    usual = patience(DOWN_STEPS, state.interval, WRONG_STEPS)
    is_fresh = not state.is_refined and state.steps < WRONG_STEPS + usual
    wanted = WRONG_STEPS if is_fresh and is_late else usual
    return known >= wanted and not is_guarded


def may_rise(state: PlanState, network: Network, known: int) -> bool:
    """Enough is known to prune less, with so much evidence."""
    if network.change == "faster":
        return True
    usual = patience(UP_STEPS, state.interval, SOON_STEPS)
    return known >= usual or _is_soon(state, known, usual)


def _is_soon(state: PlanState, known: int, usual: int) -> bool:
    """The plan has moved lately, and a few exchanges have shown what came of it."""
    return not state.is_refined and state.steps < usual and SOON_STEPS <= known < usual


def _share(state: PlanState, network: Network, known: int) -> float:
    """So many times the density must fit before it rises."""
    if network.change == "faster":
        return UP_SHARE_CHANGED
    if _is_soon(state, known, patience(UP_STEPS, state.interval, SOON_STEPS)):
        return UP_SHARE_SOON
    if state.is_refined or state.steps >= patience(REFINE_STEPS, state.interval, REFINE_LEAST):
        return UP_SHARE
    wanted = patience(link_cost.WINDOW_STEPS, state.interval, REFINE_LEAST)
    return UP_SHARE_REFINED if known >= wanted else UP_SHARE


# ---- the rules, in their order -------------------------------------------------------------------


def _from_dense(view: _View) -> Choice:
    """Dense as long as it fits, or pruning would not be faster."""
    best_s = view.prices.step_s(view.best)
    if not view.is_over:
        text = f"dense step {view.dense_s:.3f} s within {view.budget_s:.3f} s"
        return Choice(view.k, Cause.HOLD, text)
    if best_s >= CHEAPER * view.dense_s:
        text = f"dense step {view.dense_s:.3f} s, pruning would take {best_s:.3f} s"
        return Choice(view.k, Cause.HOLD, text)
    text = f"dense step {view.dense_s:.3f} s against {view.budget}"
    if not view.may_fall:
        return Choice(view.k, Cause.HOLD, text)
    return Choice(view.best, Cause.OVER_BUDGET, text)


def _to_dense(view: _View) -> Choice | None:
    """Dense where it fits the budget, or is faster than the best pruned step."""
    if not view.has_dense or not view.prices.dense_bytes:
        return None
    # Where dense is the way to meet a budget, pruning harder first would be a detour.
    may_go = view.may_rise or view.change is not None or (view.may_fall and view.is_over)
    if not may_go or view.dense_s >= max(view.now_s, view.budget_s):
        return None
    if view.prices.fits(CHUNK_NUMEL, view.budget_s):
        text = f"a dense step of {view.dense_s:.3f} s fits {view.budget}"
        return Choice(CHUNK_NUMEL, Cause.DENSE_CHEAPER, text)
    best_s = view.prices.step_s(view.best)
    if view.dense_s < CHEAPER * best_s:
        text = f"a dense step takes {view.dense_s:.3f} s, a pruned one {best_s:.3f} s"
        return Choice(CHUNK_NUMEL, Cause.DENSE_CHEAPER, text)
    return None


def _down(view: _View) -> Choice | None:
    """Prune more where the budget is missed."""
    if view.best < view.k and view.may_fall and view.is_over:
        text = f"step {view.now_s:.3f} s against {view.budget}"
        return Choice(view.best, Cause.OVER_BUDGET, text)
    return None


def _up(view: _View) -> Choice | None:
    """Prune less where clearly more fits."""
    if view.best < view.share * view.k or not view.may_rise:
        return None
    cause = Cause.BUDGET_ROOM if view.change is None else Cause.NETWORK_CHANGED
    return Choice(
        view.best, cause, f"there is room: step {view.now_s:.3f} s of {view.budget_s:.3f} s"
    )


def _stay(view: _View) -> Choice:
    """Why the plan stays."""
    if view.now_s <= view.budget_s:
        text = f"step {view.now_s:.3f} s within {view.budget_s:.3f} s"
        return Choice(view.k, Cause.HOLD, text)
    text = f"step {view.now_s:.3f} s, over {view.budget}"
    least_s = view.prices.step_s(view.k_min)
    if least_s > view.budget_s:
        text += f", which cannot be met: {least_s:.3f} s at density.min"
    return Choice(view.k, Cause.HOLD, text)
