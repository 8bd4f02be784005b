"""The law "predictive": the same order of decisions, each move as large as the model says.

    step t:  loss, times, bytes of all ranks
        |
        |-- warm-up, ramp: by the step number
        |-- a gradient or the loss is not finite: only a change of the network moves anything
        |
        |   budget: the user's, or a step at the density that learns most per second (`worth`)
        |   plan: the highest density that the budget affords (`plan`), moved only
        |     down  when the model, with 0.8 standard deviations, is over budget
        |     up    when at least a quarter more fits
        |     dense when dense fits the budget, or is faster than what pruning offers, unless
        |           density.min = density.max pins the density
        |   at once after a change of the network, otherwise after a handful of steps
        |
        |-- P(t) missed: the plan times 2, 4, 8 for a bounded time (`loss_arm`)
        v
    density of step t + 1

So missed performance has priority over the budget, but not for ever; a missed budget moves the
density to where it is met, in one step; and if both hold, nothing moves but for a change of the
network or a better estimate of it.

Times ride one step late. The alarm wants three slow exchanges in a row (two beyond 4 times), since
stalls of 2 to 4 times come in pairs, so the first step at a new rate, its two successors and the
one in which the news travels run at the old density.
"""

from __future__ import annotations

from typing import NamedTuple

from ds_gradprune import meter, performance
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.controller import loss_arm
from ds_gradprune.controller.base import (
    first_decision,
    keep_last,
    kept_per_chunk,
    schedule,
    target_at,
)
from ds_gradprune.controller.network import Net, observe, prices_of
from ds_gradprune.controller.plan import Prices, ladder
from ds_gradprune.controller.state import UP_STEPS, PredictiveState
from ds_gradprune.controller.worth import best_k
from ds_gradprune.records import CHUNK_NUMEL, Cause, Decision, StepSignals

UP_SHARE = 1.25
"""So many times the density must fit before it rises: the dead band."""

UP_SHARE_CHANGED, UP_SHARE_REFINED = 1.1, 1.08
"""The same after a change of the network, and once after a move, when a whole window of exchanges
has made the estimate better."""

SOON_STEPS, UP_SHARE_SOON = 3, 1.5
"""Exchanges after a move that suffice to rise again, if so much more fits: it was too timid."""

REFINE_STEPS = 2 * meter.WINDOW_STEPS
"""After so many steps at a density there is nothing to refine."""

COMPUTE_STEPS = 32
"""Computation times behind their median: one step in five may have a straggler."""

DOWN_MARGIN = 0.8
"""Standard deviations: the density falls when fewer than these are left to the budget."""

WRONG_STEPS = 2
"""Exchanges after a move that suffice when the budget is plainly missed: the move was too bold."""

DOWN_STEPS = 5
"""Exchanges at a density before it falls without a change of the network."""

CHEAPER = 0.95
"""Dense must take less than this share of a pruned step to be called cheaper."""


def start(config: GradientPruningConfig) -> tuple[PredictiveState, Decision]:
    """The state before any step, and the decision for step 1.

    Args:
        config: the validated block.

    Returns:
        State and decision.
    """
    decision = first_decision(config)
    plan_k = kept_per_chunk(config.density.initial)
    return PredictiveState(density=decision.density, plan_k=plan_k), decision


def update(
    config: GradientPruningConfig, state: PredictiveState, signals: StepSignals
) -> tuple[PredictiveState, Decision]:
    """Take in one step's signals and decide for the step after it.

    Args:
        config: the validated block.
        state: what the last call returned; its density is the one that `signals.step` used.
        signals: what all ranks agreed on in `signals.step`.

    Returns:
        The new state, and the decision for step `signals.step + 1`.
    """
    net = observe(state.network, signals)
    compute_s = signals.compute_time_s if signals.timed_density is not None else None
    computes_s = keep_last(state.compute_times_s, compute_s, COMPUTE_STEPS)
    loss, is_spike = None if signals.nonfinite else signals.loss, False
    if loss is not None:
        loss, is_spike = loss_arm.clipped(state.performance.losses, loss)
    losses, p = performance.observe(
        state.performance,
        loss,
        window_size=config.window_size,
        form=config.performance_form,
    )
    prices = prices_of(config, net, computes_s)
    budget_s = _budget_s(config, state, prices, signals.step)
    step, arm, plan_k, steps_here = signals.step + 1, state.arm, state.plan_k, state.steps_here
    scheduled = schedule(config, step)
    if scheduled is not None:
        chosen = _Chosen(*scheduled)
    else:
        arm, verdict = _ask_arm(config, state, signals, losses, p, is_spike=is_spike)
        plan = _plan(config, state, net, prices, budget_s, is_guarded=arm.guard > 0)
        if signals.nonfinite and net.changed is None:
            plan = _Plan(_inside(config, state.plan_k))
        plan_k, steps_here = plan.k, _steps_here(state, plan)
        chosen = _choose(config, state, arm, verdict, plan, signals.nonfinite)
    density, reason = chosen.k / CHUNK_NUMEL, chosen.reason
    if net.changed is not None and chosen.cause is not Cause.NETWORK_CHANGED:
        reason += f"; the network became {net.changed}{_rate(prices)}"
    decision = Decision(
        step=step,
        density=density,
        cause=chosen.cause,
        reason=reason,
        performance=p,
        budget_s=budget_s,
        network_changed=net.changed is not None,
        predicted_step_s=None if prices is None else prices.step_s(chosen.k),
        rate_bytes_per_s=None if prices is None else 1.0 / prices.seconds_per_byte,
    )
    after = PredictiveState(density, plan_k, steps_here, losses, arm, computes_s, net.state)
    return after, decision


def _ask_arm(
    config: GradientPruningConfig,
    state: PredictiveState,
    signals: StepSignals,
    losses: performance.PerformanceState,
    p: float | None,
    *,
    is_spike: bool,
) -> tuple[loss_arm.ArmState, loss_arm.Verdict]:
    """What the losses ask for."""
    return loss_arm.judge(
        state.arm,
        losses,
        p,
        is_known=losses is not state.performance,
        is_spike=is_spike,
        is_nonfinite=signals.nonfinite,
        target=target_at(config, signals.step),
        window_size=config.window_size,
        form=config.performance_form,
    )


def _budget_s(
    config: GradientPruningConfig, state: PredictiveState, prices: Prices | None, step: int
) -> float | None:
    """The user's, or what a step takes at the density that learns most per second.

    None while the link is not known.
    """
    if config.step_time_budget_s is not None or prices is None:
        return config.step_time_budget_s
    k = best_k(
        prices,
        config.prune,
        step,
        kept_per_chunk(config.density.min),
        kept_per_chunk(config.density.max),
        # Going dense or back needs more than being level: who is there stays there.
        dense_share=1.0 / CHEAPER if state.plan_k == CHUNK_NUMEL else CHEAPER,
    )
    return prices.step_s(k) + prices.margin_s(k)


# ---- the plan ------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """Kept elements per chunk; cause and reason of a move, or why there is none."""

    k: int
    cause: Cause | None = None
    text: str = ""


def _plan(
    config: GradientPruningConfig,
    state: PredictiveState,
    net: Net,
    prices: Prices | None,
    budget_s: float | None,
    *,
    is_guarded: bool,
) -> _Plan:
    """What the budget affords."""
    k = _inside(config, state.plan_k)
    if prices is None or net.reading is None or budget_s is None:
        return _Plan(k, text="no exchange was timed")
    kind = "an automatic" if config.step_time_budget_s is None else "a"
    budget = f"{kind} budget of {budget_s:.3f} s"
    k_min, k_max = kept_per_chunk(config.density.min), kept_per_chunk(config.density.max)
    best = prices.affordable_k(budget_s, k_min, k_max)
    here = min(net.reading.samples, state.steps_here)
    now_s = prices.step_s(k)
    is_soon_after = state.steps_here < WRONG_STEPS + DOWN_STEPS
    patience = WRONG_STEPS if is_soon_after and now_s > budget_s else DOWN_STEPS
    may_fall = net.changed is not None or (here >= patience and not is_guarded)
    may_rise = net.changed == "faster" or here >= UP_STEPS
    share = UP_SHARE
    if net.changed == "faster":
        share = UP_SHARE_CHANGED
    elif SOON_STEPS <= here < UP_STEPS > state.steps_here:
        may_rise, share = True, UP_SHARE_SOON
    elif meter.WINDOW_STEPS <= here and state.steps_here < REFINE_STEPS:
        share = UP_SHARE_REFINED
    if k == CHUNK_NUMEL:
        return _from_dense(k, best, prices, budget_s, budget, may_fall)
    dense_s = prices.step_s(CHUNK_NUMEL)
    is_worth_a_look = k_min < k_max and dense_s < max(now_s, budget_s)  # min = max pins it
    is_over = not prices.fits(k, budget_s, DOWN_MARGIN)
    # Where dense is the way to meet a budget, pruning harder first would be a detour.
    may_go_dense = may_rise or net.changed is not None or (is_over and may_fall)
    if prices.dense_bytes and is_worth_a_look and may_go_dense:
        best_s = prices.step_s(best)
        if prices.fits(CHUNK_NUMEL, budget_s):
            text = f"a dense step of {dense_s:.3f} s fits {budget}"
            return _Plan(CHUNK_NUMEL, Cause.DENSE_CHEAPER, text)
        if dense_s < CHEAPER * best_s:
            text = f"a dense step takes {dense_s:.3f} s, a pruned one {best_s:.3f} s"
            return _Plan(CHUNK_NUMEL, Cause.DENSE_CHEAPER, text)
    if best < k and is_over and may_fall:
        text = f"step {now_s:.3f} s against {budget}"
        return _Plan(best, Cause.OVER_BUDGET, text)
    if best >= share * k and may_rise:
        cause, why = Cause.BUDGET_ROOM, "there is room"
        if net.changed is not None:
            cause, why = Cause.NETWORK_CHANGED, f"the network became {net.changed}{_rate(prices)}"
        return _Plan(best, cause, f"{why}: step {now_s:.3f} s of {budget_s:.3f} s")
    if now_s > budget_s:
        least_s = prices.step_s(k_min)
        over = f"step {now_s:.3f} s, over its budget of {budget_s:.3f} s"
        cannot = f", which cannot be met: {least_s:.3f} s at density.min"
        return _Plan(k, text=over + (cannot if least_s > budget_s else ""))
    return _Plan(k, text=f"step {now_s:.3f} s within {budget_s:.3f} s")


def _from_dense(
    k: int, best: int, prices: Prices, budget_s: float, budget: str, may_fall: bool
) -> _Plan:
    """Dense as long as it fits, or pruning would not be faster."""
    dense_s, best_s = prices.step_s(k), prices.step_s(best)
    if prices.fits(k, budget_s, DOWN_MARGIN):
        return _Plan(k, text=f"dense step {dense_s:.3f} s within {budget_s:.3f} s")
    if best_s >= CHEAPER * dense_s:
        return _Plan(k, text=f"dense step {dense_s:.3f} s, pruning would take {best_s:.3f} s")
    text = f"dense step {dense_s:.3f} s against {budget}"
    return _Plan(best, Cause.OVER_BUDGET, text) if may_fall else _Plan(k, text=text)


def _steps_here(state: PredictiveState, plan: _Plan) -> int:
    """Steps since the plan moved; a small rise is a refinement, after which there is none."""
    if plan.cause is None:
        return state.steps_here + 1
    return REFINE_STEPS if 1.0 <= plan.k / state.plan_k < UP_SHARE else 0


def _inside(config: GradientPruningConfig, k: int) -> int:
    """A plan from a checkpoint may lie outside bounds that were changed since."""
    if k == CHUNK_NUMEL:
        return k
    return max(kept_per_chunk(config.density.min), min(kept_per_chunk(config.density.max), k))


# ---- the decision --------------------------------------------------------------------------------


class _Chosen(NamedTuple):
    """Kept elements per chunk, and why."""

    k: int
    cause: Cause
    reason: str


def _choose(
    config: GradientPruningConfig,
    state: PredictiveState,
    arm: loss_arm.ArmState,
    verdict: loss_arm.Verdict,
    plan: _Plan,
    is_nonfinite: bool,
) -> _Chosen:
    """The plan, doubled as often as the losses ask for."""
    before = round(state.density * CHUNK_NUMEL)
    k = plan.k
    if k != CHUNK_NUMEL and arm.raises:
        k = max(k, min(kept_per_chunk(config.density.max), ladder(k << arm.raises)))
    if is_nonfinite and k == before:
        return _Chosen(k, Cause.HOLD, f"a gradient or the loss is not finite: hold at {_name(k)}")
    if verdict.event == "raise":
        move = _move(before, k) if k > before else f"already at {_name(k)}, hold"
        return _Chosen(k, Cause.PERFORMANCE_MISSED, f"{verdict.text}: {move}")
    if plan.cause is not None and k != before:
        return _Chosen(k, plan.cause, f"{plan.text}: {_move(before, k)}")
    if verdict.event is not None and k != before:
        text = f"{verdict.text}: back to what the budget affords, {_move(before, k)}"
        return _Chosen(k, Cause.OVER_BUDGET, text)
    if k != before:
        return _Chosen(k, Cause.HOLD, f"brought inside density.min and max: {_move(before, k)}")
    return _Chosen(k, Cause.HOLD, f"{verdict.text}, {plan.text}: hold at {_name(k)}")


def _move(before: int, after: int) -> str:
    return f"density {_name(before)} -> {_name(after)}"


def _name(k: int) -> str:
    return "dense" if k == CHUNK_NUMEL else f"{k / CHUNK_NUMEL:.4f}"


def _rate(prices: Prices | None) -> str:
    return "" if prices is None else f" ({8e-6 / prices.seconds_per_byte:.3g} Mbit/s)"
