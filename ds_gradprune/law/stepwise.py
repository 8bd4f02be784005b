"""The law "stepwise": the seed's order of decisions taken literally, one factor at a time.

1. Warm-up is dense, then the ramp (`schedule`).
2. P(t) misses its target: prune less, density / 0.7.
3. P(t) holds and the step time misses its budget: prune more, density * 0.7.
4. Both hold: hold.
5. A change of the network triggers the adjustment, until 3 or 4 comes to rest: a slower one lets
   one step time suffice instead of three, a faster one lets the density rise while the next fits.

A non-finite gradient or loss changes nothing. Known weakness: on a plateau P is noise around 0, so
a target of 0 is missed in half of the steps and the density climbs to density.max.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ds_gradprune.bucket.layout import CHUNK_NUMEL, kept_per_chunk
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.law import alarm, blame, learning
from ds_gradprune.law.alarm import AlarmState
from ds_gradprune.law.decision import Cause, Choice, Decision, Density, move, name
from ds_gradprune.law.learning import LossWindow
from ds_gradprune.law.schedule import first_decision, next_exchange, scheduled, target_at
from ds_gradprune.law.signals import StepSignals
from ds_gradprune.law.stats import Change, Seconds, is_time, median
from ds_gradprune.law.step_times import budget, confirming, own_times, step_times

STEP_FACTOR = 0.7  # one move of the density


class StepwiseState(NamedTuple):
    """Everything the law remembers.

    Attributes:
        density: of the exchange that is next or under way.
        window: the newest losses.
        alarm: what is known of the network.
        local_times_s: the last times of computation and codec, oldest first.
        step_times_s: the last step times at `density` since the network changed, oldest first.
        change: how the network has changed, until the density fits it.
    """

    density: Density
    window: LossWindow = LossWindow()
    alarm: AlarmState = AlarmState()
    local_times_s: tuple[Seconds, ...] = ()
    step_times_s: tuple[Seconds, ...] = ()
    change: Change | None = None


def start(config: GradientPruningConfig) -> tuple[StepwiseState, Decision]:
    """The state before any step, and the decision for step 1."""
    decision = first_decision(config)
    return StepwiseState(decision.density), decision


def update(
    config: GradientPruningConfig, state: StepwiseState, signals: StepSignals
) -> tuple[StepwiseState, Decision]:
    """Take in one step's signals and decide for the step after it; see `law.update`."""
    loss = None if signals.nonfinite else signals.loss
    form, interval = config.performance_form, config.first_interval
    size = config.window_losses(interval)
    window, p = learning.observe(state.window, loss, window_size=size, form=form)
    alarms, change, own_s = state.alarm, None, state.local_times_s
    if signals.timed_density is not None:
        alarms, change = alarm.watch(alarms, signals.comm_time_s, signals.wire_bytes)
        own_s = own_times(own_s, signals, interval)
    steps_s = state.step_times_s if change is None else ()
    steps_s = step_times(steps_s, signals, state.density, interval)
    budget_s = budget(config.step_time_budget_s, own_s)
    after = StepwiseState(state.density, window, alarms, own_s, steps_s, change or state.change)
    unpruned = config.warmup_form == "unpruned"
    step = next_exchange(config, signals.step, interval, unpruned=unpruned)
    choice, going_on = scheduled(config, step, unpruned=unpruned), None
    if choice is None:
        choice, going_on = _decide(config, after, signals, p, budget_s)
    density, reason = choice.k / CHUNK_NUMEL, choice.text
    calm_s = blame.calmer(None, sorted(own_s))
    said = blame.words(change, own_s, calm_s, state.alarm.samples, alarms.samples, "")
    reason = blame.told(reason, said)
    steps_s = steps_s if density == state.density else ()
    unpruned, changed = unpruned and choice.cause is Cause.WARMUP, change is not None
    decision = Decision(
        step, density, choice.cause, reason, p, budget_s, changed, None, None, interval, unpruned
    )
    return after._replace(density=density, step_times_s=steps_s, change=going_on), decision


def _decide(
    config: GradientPruningConfig,
    state: StepwiseState,
    signals: StepSignals,
    p: float | None,
    budget_s: float | None,
) -> tuple[Choice, Change | None]:
    """The rules in their order, and the change that is still to be adjusted to."""
    k_min, k_max = kept_per_chunk(config.density.min), kept_per_chunk(config.density.max)
    k = max(k_min, min(k_max, kept_per_chunk(state.density)))
    less, more = min(k_max, math.ceil(k / STEP_FACTOR)), math.ceil(k * STEP_FACTOR)
    more = max(k_min, min(k - 1, more))
    if signals.nonfinite:
        return _hold(k, "a gradient or the loss is not finite"), state.change
    target = target_at(config, signals.step)
    if p is not None and p < target:
        text = f"P {p:.2f} misses its target {target:g}: {move(k, less)}"
        return Choice(less, Cause.PERFORMANCE_MISSED, text), state.change
    learned = "P not known yet" if p is None else f"P {p:.2f} >= target {target:g}"
    if budget_s is None or not state.step_times_s:
        return _hold(k, f"{learned}, no step time at this density yet"), state.change
    step_s, numel = median(state.step_times_s), len(state.step_times_s)
    wanted = confirming(config.first_interval)
    if step_s <= budget_s:
        text = f"{learned}, step {step_s:.3f} s within {budget_s:.3f} s"
        return _adjust(state, signals, (k, less), budget_s - step_s, text, numel >= wanted)
    kind = "an automatic" if config.step_time_budget_s is None else "the"
    text = f"step {step_s:.3f} s over {kind} budget of {budget_s:.3f} s"
    if numel < wanted and state.change != "slower":
        return _hold(k, f"{text} in {numel} of {wanted} steps"), state.change
    going_on = state.change if state.change == "slower" else None
    return Choice(more, Cause.OVER_BUDGET, f"{text}: {move(k, more)}"), going_on


def _adjust(
    state: StepwiseState,
    signals: StepSignals,
    ks: tuple[int, int],
    room_s: float,
    text: str,
    sure: bool,
) -> tuple[Choice, Change | None]:
    """Both hold: prune less if a faster network allows it."""
    k, less = ks
    if state.change != "faster" or less == k:
        return _hold(k, text), None
    is_timed = signals.timed_density == state.density and is_time(signals.comm_time_s)
    if not is_timed or signals.wire_bytes <= 0:
        return _hold(k, text), state.change
    # Headers and dense segments do not grow with k: this is the most that the next step can take.
    growth = signals.dense_bytes / signals.wire_bytes if less == CHUNK_NUMEL else less / k
    more_s = (growth - 1.0) * signals.comm_time_s / signals.interval
    if more_s > room_s:
        text = f"{text}, and {more_s:.3f} s more at {name(less)}"
        return _hold(k, text), None if sure else state.change
    text = f"{text}, and {more_s:.3f} s more on the faster link: {move(k, less)}"
    return Choice(less, Cause.NETWORK_CHANGED, text), state.change


def _hold(k: int, text: str) -> Choice:
    return Choice(k, Cause.HOLD, f"{text}: hold at {name(k)}")
