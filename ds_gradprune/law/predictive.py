"""The law "predictive": the seed's order of decisions, each move as large as the model says.

    step t:  loss, times, bytes of all ranks
        |
        |-- warm-up, ramp: by the step number (`schedule`)
        |-- a gradient or the loss is not finite: only a change of the network moves anything
        |
        |   budget: the user's, or a step at the density that learns most per second
        |           (`progress_model`)
        |   interval: with "sync_every": "auto", one octave at a time (`interval`)
        |   plan:   the highest density that the budget affords, moved seldom (`plan`)
        |
        |-- P(t) missed: the plan times 2, 4, 8 for a bounded time (`loss_arm`)
        v
    density of the next exchange, and how many steps it is away

So missed performance has priority over the budget, but not for ever. A missed budget moves the
density to where it is met, in one step. If both hold, only news of the network moves anything.

Times ride one exchange late. The alarm wants three slow exchanges in a row (two beyond 4 times),
since stalls of 2 to 4 times come in pairs. So the first exchange at a new rate, its two successors
and the one in which the news travels run at the old density.
"""

from __future__ import annotations

from typing import NamedTuple

from ds_gradprune.bucket.layout import CHUNK_NUMEL, kept_per_chunk
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.law import blame, learning, loss_arm, network, outliers, plan, warmup
from ds_gradprune.law import interval as intervals
from ds_gradprune.law.decision import (
    Cause,
    Choice,
    Decision,
    Density,
    Interval,
    move,
    name,
)
from ds_gradprune.law.learning import LossWindow
from ds_gradprune.law.loss_arm import ArmState, Verdict
from ds_gradprune.law.network import NetworkState
from ds_gradprune.law.plan import PlanState
from ds_gradprune.law.prices import Prices
from ds_gradprune.law.schedule import (
    first_decision,
    next_exchange,
    target_at,
)
from ds_gradprune.law.signals import StepSignals
from ds_gradprune.law.stats import Seconds
from ds_gradprune.law.step_times import compute_times
from ds_gradprune.law.warmup import WarmupState


class PredictiveState(NamedTuple):
    """Everything the law remembers. The position in warm-up and ramp is the step number itself.

    Attributes:
        density: of the exchange that is next or under way.
        plan: what the budget affords.
        window: the newest losses.
        lows: which of the last losses leapt down.
        arm: what the losses ask for.
        compute_times_s: the last compute times, oldest first.
        network: what is known of the exchanges.
        interval: optimizer steps up to the exchange that is next or under way.
        warmup: what is known of the warm-up's exchanges.
        calm_s: what a computation takes while hosts are calm; None: unknown.
    """

    density: Density
    plan: PlanState
    window: LossWindow = LossWindow()
    lows: outliers.Lows = 0
    arm: ArmState = ArmState()
    compute_times_s: tuple[Seconds, ...] = ()
    network: NetworkState = NetworkState()
    interval: Interval = 1
    warmup: WarmupState = WarmupState()
    calm_s: Seconds | None = None


def start(config: GradientPruningConfig) -> tuple[PredictiveState, Decision]:
    """The state before any step, and the decision for step 1.

    Args:
        config: the validated block.

    Returns:
        State and decision.
    """
    decision = first_decision(config)
    planned = PlanState(kept_per_chunk(config.density.initial), interval=decision.interval)
    warm = WarmupState(unpruned=decision.unpruned)
    state = PredictiveState(decision.density, planned, interval=decision.interval, warmup=warm)
    return state, decision


def update(
    config: GradientPruningConfig, state: PredictiveState, signals: StepSignals
) -> tuple[PredictiveState, Decision]:
    """Take in one step's signals and decide for the step after it.

    Args:
        config: the validated block.
        state: what the last call returned; its density is the one that `signals.step` used.
        signals: what all ranks agreed on in `signals.step`.

    Returns:
        The new state, and the decision for the next exchange.
    """
    interval = warmup.used_interval(config, state.warmup, state.interval)
    planned = state.plan.at(intervals.inside(config, state.plan.interval))
    net = network.observe(state.network, signals)
    computes_s = compute_times(state.compute_times_s, signals, interval)
    heard = _listen(config, state, signals, config.window_losses(interval))
    ordered_s = sorted(computes_s)
    prices = network.prices_of(config, net, ordered_s, planned.interval)
    budget_s = _budget_s(config, state, prices, signals.step)
    warm, arm = warmup.observe(config, state.warmup, signals, computes_s), state.arm
    ways = (interval, planned.interval)
    beginning = warmup.begin(config, state.warmup, warm, signals.step, computes_s, ways, prices)
    if beginning is not None:
        choice = beginning.choice
        if choice.cause is Cause.RAMP:  # the plan begins where a ramp that was cut ends
            planned = planned._replace(k=min(kept_per_chunk(config.density.initial), choice.k))
    else:
        arm, verdict = _ask_arm(config, state, signals, heard, interval)
        wanted = _plan(config, planned, net, prices, budget_s, arm, signals)
        planned = planned.after(wanted)
        if wanted.interval is not None and prices is not None:
            prices = prices.at(planned.interval, config.delay_of(planned.interval))
        choice = _choose(
            config, state, arm, verdict, wanted, planned.interval, is_nonfinite=signals.nonfinite
        )
    after = choice.interval or intervals.inside(config, interval)
    unpruned = beginning is not None and beginning.unpruned
    if warm.unpruned != unpruned:
        warm = warm._replace(unpruned=unpruned)
    calm_s = blame.calmer(state.calm_s, ordered_s)
    decision = Decision(
        step=next_exchange(config, signals.step, after, unpruned=unpruned),
        density=choice.k / CHUNK_NUMEL,
        cause=choice.cause,
        reason=_reason(choice, state, net, prices, computes_s, calm_s),
        performance=heard.p,
        budget_s=budget_s,
        network_changed=net.change is not None,
        predicted_step_s=intervals.predicted_s(config, prices, choice.k, after),
        rate_bytes_per_s=None if prices is None else 1.0 / prices.seconds_per_byte,
        interval=after,
        unpruned=unpruned,
    )
    heard_of = (heard.window, heard.lows, arm, computes_s, net.state, after, warm, calm_s)
    return PredictiveState(decision.density, planned, *heard_of), decision


def _reason(
    choice: Choice,
    before: PredictiveState,
    net: network.Network,
    prices: Prices | None,
    computes_s: tuple[float, ...],
    calm_s: float | None,
) -> str:
    """Why a choice was made, with what is said of the network or of busy hosts."""
    said = ""
    if net.change is not None:
        rate = "" if prices is None else prices.rate_text
        samples = (before.network.cost.samples, net.state.cost.samples)
        said = blame.words(net.change, computes_s, calm_s, *samples, rate)
    elif choice.cause is Cause.OVER_BUDGET:
        said = blame.busy_words(computes_s, calm_s)
    return blame.told(choice.text, said)


def _plan(
    config: GradientPruningConfig,
    planned: PlanState,
    net: network.Network,
    prices: Prices | None,
    budget_s: float | None,
    arm: ArmState,
    signals: StepSignals,
) -> Choice:
    """What the budget affords: another interval, or another density at this one."""
    if signals.nonfinite and net.change is None:
        return Choice(plan.inside(config, planned.k), Cause.HOLD, "")
    is_guarded, is_missed = arm.guard > 0, arm.raises > 0
    known, turn = (config, planned, net, prices, budget_s), None
    if config.sync_every == "auto":
        turn = intervals.choose(*known, signals.step, is_guarded=is_guarded, is_missed=is_missed)
    return turn or plan.choose(*known, is_guarded=is_guarded)


class _Heard(NamedTuple):
    """What the newest loss says."""

    window: LossWindow
    window_size: int
    lows: int
    p: float | None
    is_known: bool
    leapt_up: bool


def _listen(
    config: GradientPruningConfig, state: PredictiveState, signals: StepSignals, window_size: int
) -> _Heard:
    """Clip the loss, put it into the window, and look at P."""
    loss, leapt_up, lows = None if signals.nonfinite else signals.loss, False, state.lows
    if loss is not None:
        loss, leapt_up, lows = outliers.clip(state.window.losses, lows, loss)
    window, p = learning.observe(
        state.window,
        loss,
        window_size=window_size,
        form=config.performance_form,
        most=config.window_size,
    )
    return _Heard(window, window_size, lows, p, learning.is_usable(loss), leapt_up)


def _ask_arm(
    config: GradientPruningConfig,
    state: PredictiveState,
    signals: StepSignals,
    heard: _Heard,
    interval: int,
) -> tuple[ArmState, Verdict]:
    """What the losses ask for."""
    return loss_arm.judge(
        state.arm,
        heard.window,
        heard.p,
        is_known=heard.is_known,
        is_spike=heard.leapt_up,
        is_nonfinite=signals.nonfinite,
        target=target_at(config, signals.step),
        window_size=heard.window_size,
        form=config.performance_form,
        steps=interval,
    )


def _budget_s(
    config: GradientPruningConfig, state: PredictiveState, prices: Prices | None, step: int
) -> float | None:
    """The user's, or what a step takes at the density that learns most per second.

    None while the link is not known.
    """
    if config.step_time_budget_s is not None or prices is None:
        return config.step_time_budget_s
    # Going dense or back needs more than being level: who is there stays there.
    share = 1.0 / plan.CHEAPER if state.plan.k == CHUNK_NUMEL else plan.CHEAPER
    return intervals.budget_at(config, prices, step, dense_share=share)


def _choose(
    config: GradientPruningConfig,
    state: PredictiveState,
    arm: ArmState,
    verdict: Verdict,
    wanted: Choice,
    planned: int,
    *,
    is_nonfinite: bool,
) -> Choice:
    """The plan, doubled as often as the losses ask for; with the interval, where that moves."""
    before, k = round(state.density * CHUNK_NUMEL), wanted.k
    if config.sync_every == "auto":
        used = intervals.inside(config, state.interval)
        k, interval = intervals.raised(config, k, planned, arm.raises)
        k, interval = intervals.one_octave(config, k, interval, used)
        if interval != used:
            return intervals.turn(before, k, used, interval, verdict, wanted)
    elif k != CHUNK_NUMEL and arm.raises:
        k = intervals.doubled(config, k, arm.raises)
    if is_nonfinite and k == before:
        return Choice(k, Cause.HOLD, f"a gradient or the loss is not finite: hold at {name(k)}")
    if verdict.event == "raise":
        text = move(before, k) if k > before else f"already at {name(k)}, hold"
        return Choice(k, Cause.PERFORMANCE_MISSED, f"{verdict.text}: {text}")
    if k == before:
        return Choice(k, Cause.HOLD, f"{verdict.text}, {wanted.text}: hold at {name(k)}")
    if wanted.cause is not Cause.HOLD:
        return Choice(k, wanted.cause, f"{wanted.text}: {move(before, k)}")
    if verdict.event is not None:
        text = f"{verdict.text}: back to what the budget affords, {move(before, k)}"
        return Choice(k, Cause.OVER_BUDGET, text)
    return Choice(k, Cause.HOLD, f"brought inside density.min and max: {move(before, k)}")
