"""The law "stepwise": the order of decisions taken literally, one factor at a time.

In its order:

1. step <= warmup_steps: dense.
2. For ramp_steps steps the density falls geometrically from density.max to density.initial.
3. P(t) below the target: prune less, density / 0.7, at most density.max.
4. P(t) holds (or is not known yet) and the step time misses its budget: prune more, density * 0.7,
   at least density.min.
5. Both hold: hold. Only a change of the network moves the density then: after a change to a faster
   link it rises one step at a time while the link model predicts the next step within the budget.
   A slower link needs no rule of its own: 4 acts, and from then on trusts a single sample.

Steps 1 and 2 go by the step number alone. In a step with a non-finite gradient or loss the law
changes nothing. Times lag: the signals of a step carry the times of the step before, so only times
measured at the density that is in force count, and three of them before rule 4 prunes.

Known weaknesses, which "predictive" answers. Rule 3: on any plateau, so at the end of training, P
is 0 plus or minus noise for every density; a target of 0 is missed in about half of the steps and
the density climbs to density.max. Set the target below the noise (-0.2 at window_size 128, form
"edge") or lower density.max. Rule 4: two stalls among three steps look like a missed budget, and
what they cost does not come back before the network changes or P misses. And it never goes dense
where pruning does not pay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ds_gradprune import link, performance
from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.controller.base import (
    first_decision,
    is_time,
    keep_last,
    kept_per_chunk,
    median,
    schedule,
    target_at,
)
from ds_gradprune.errors import CheckpointError
from ds_gradprune.records import CHUNK_NUMEL, Cause, Decision, StepSignals

STEP_FACTOR = 0.7
"""One move of the density: times this, or divided by it."""

CONFIRM_STEPS = 3
"""Step times at one density before it is called over budget; their median stands one outlier."""

BUDGET_FACTOR = 1.1
"""Without a budget of the user's, a step may take this many times a rank's own work in it."""

LOCAL_WINDOW_STEPS = 16
"""Times of a rank's own work behind the automatic budget."""

LAW = "stepwise"
"""Its name in the configuration."""


@dataclass(frozen=True, slots=True)
class StepwiseState:
    """Everything the law remembers. The position in warm-up and ramp is the step number itself.

    Attributes:
        density: of the step that is next or under way.
        performance: the window of losses.
        link: the link model.
        local_times_s: the last LOCAL_WINDOW_STEPS times of computation and codec, oldest first.
        step_times_s: the last CONFIRM_STEPS step times at `density`, on the network as it is now,
            oldest first.
        adjusting: the network became faster, and the density may still rise for it.
        pressed: the network became slower, and no step has been within budget since.
    """

    density: float
    performance: performance.PerformanceState = field(default_factory=performance.PerformanceState)
    link: link.LinkState = field(default_factory=link.LinkState)
    local_times_s: tuple[float, ...] = ()
    step_times_s: tuple[float, ...] = ()
    adjusting: bool = False
    pressed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` restores an equal state."""
        return {
            "law": LAW,
            "density": self.density,
            "performance": self.performance.to_json(),
            "link": self.link.to_json(),
            "local_times_s": list(self.local_times_s),
            "step_times_s": list(self.step_times_s),
            "adjusting": self.adjusting,
            "pressed": self.pressed,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepwiseState:
        """The state that `to_json` wrote.

        Raises:
            CheckpointError: the data is not such a state.
        """
        try:
            density = float(data["density"])
            kept_per_chunk(density)
            return cls(
                density=density,
                performance=performance.PerformanceState.from_json(data["performance"]),
                link=link.LinkState.from_json(data["link"]),
                local_times_s=tuple(float(time_s) for time_s in data["local_times_s"]),
                step_times_s=tuple(float(time_s) for time_s in data["step_times_s"]),
                adjusting=bool(data["adjusting"]),
                pressed=bool(data["pressed"]),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise CheckpointError(
                f"controller must be a saved controller state, got {data!r}: {exc}"
            ) from exc


class _Choice(NamedTuple):
    """What a rule wants: kept elements per chunk, and why."""

    k: int
    cause: Cause
    reason: str
    adjusting: bool = False
    pressed: bool = False


def start(config: GradientPruningConfig) -> tuple[StepwiseState, Decision]:
    """The state before any step, and the decision for step 1.

    Args:
        config: the validated block.

    Returns:
        State and decision.
    """
    decision = first_decision(config)
    return StepwiseState(density=decision.density), decision


def update(
    config: GradientPruningConfig, state: StepwiseState, signals: StepSignals
) -> tuple[StepwiseState, Decision]:
    """Take in one step's signals and decide for the step after it.

    Args:
        config: the validated block.
        state: what the last call returned; its density is the one that `signals.step` used.
        signals: what all ranks agreed on in `signals.step`.

    Returns:
        The new state, and the decision for step `signals.step + 1`.
    """
    state, known = _take_in(config, state, signals)
    step = signals.step + 1
    scheduled = schedule(config, step)
    choice = _Choice(*scheduled) if scheduled else _law(config, state, signals, known)
    reason = choice.reason
    if known.estimate.changed is not None:
        reason += f"; the network became {known.estimate.changed}{_rate(known.estimate)}"
    density = choice.k / CHUNK_NUMEL
    decision = Decision(
        step=step,
        density=density,
        cause=choice.cause,
        reason=reason,
        performance=known.performance,
        budget_s=known.budget_s,
        network_changed=known.estimate.changed is not None,
    )
    # Spelled out: dataclasses.replace would cost as much as the law itself.
    state = StepwiseState(
        density=density,
        performance=state.performance,
        link=state.link,
        local_times_s=state.local_times_s,
        step_times_s=state.step_times_s if density == state.density else (),
        adjusting=choice.adjusting,
        pressed=choice.pressed,
    )
    return state, decision


class _Known(NamedTuple):
    """What the windows say after a step."""

    performance: float | None
    budget_s: float | None
    estimate: link.LinkEstimate


def _take_in(
    config: GradientPruningConfig, state: StepwiseState, signals: StepSignals
) -> tuple[StepwiseState, _Known]:
    """Move the windows on by one step, in warm-up and ramp as well."""
    losses, p = performance.observe(
        state.performance,
        None if signals.nonfinite else signals.loss,
        window_size=config.window_size,
        form=config.performance_form,
    )
    is_timed = signals.timed_density is not None
    links, estimate = link.observe(
        state.link, signals.comm_time_s if is_timed else None, signals.wire_bytes
    )
    local_s = signals.compute_time_s
    if not is_timed or not is_time(local_s):
        local_s = None
    elif is_time(signals.codec_time_s):
        local_s += signals.codec_time_s
    locals_s = keep_last(state.local_times_s, local_s, LOCAL_WINDOW_STEPS)
    budget_s = config.step_time_budget_s
    if budget_s is None and locals_s:
        budget_s = BUDGET_FACTOR * median(locals_s)
    # Times from before a change are those of another network.
    steps_s = () if estimate.changed is not None else state.step_times_s
    if signals.timed_density == state.density:
        steps_s = keep_last(steps_s, signals.step_time_s, CONFIRM_STEPS)
    state = StepwiseState(
        density=state.density,
        performance=losses,
        link=links,
        local_times_s=locals_s,
        step_times_s=steps_s,
        adjusting=state.adjusting,
        pressed=state.pressed,
    )
    return state, _Known(p, budget_s, estimate)


def _law(
    config: GradientPruningConfig, state: StepwiseState, signals: StepSignals, known: _Known
) -> _Choice:
    """Rules 3 to 5."""
    k_min, k_max = kept_per_chunk(config.density.min), kept_per_chunk(config.density.max)
    k = max(k_min, min(k_max, kept_per_chunk(state.density)))
    changed, budget_s = known.estimate.changed, known.budget_s
    adjusting = changed == "faster" or (state.adjusting and changed is None)
    pressed = changed == "slower" or (state.pressed and changed is None)

    def hold(text: str, *, adjusting: bool = adjusting, pressed: bool = pressed) -> _Choice:
        text = f"{text}: hold at {k / CHUNK_NUMEL:.4f}"
        return _Choice(k, Cause.HOLD, text, adjusting, pressed)

    if signals.nonfinite:
        return hold("a gradient or the loss is not finite")
    p, target = known.performance, target_at(config, signals.step)
    if p is not None and p < target:
        k_next = _less_pruned(k, k_max)
        reason = f"P {p:.2f} misses its target {target:g}: {_move(k, k_next, 'density.max')}"
        return _Choice(k_next, Cause.PERFORMANCE_MISSED, reason, adjusting, pressed)
    if p is None:
        learning = f"P not known yet ({len(state.performance.losses)} of {config.window_size + 1})"
    else:
        learning = f"P {p:.2f} >= target {target:g}"
    if budget_s is None:
        return hold(f"{learning}, the step time budget is not known yet")
    if not state.step_times_s:
        return hold(f"{learning}, no step time at this density yet")

    step_s, samples = median(state.step_times_s), len(state.step_times_s)
    if step_s > budget_s:
        over = f"step {step_s:.3f} s over its budget of {budget_s:.3f} s"
        if samples < CONFIRM_STEPS and not pressed:
            return hold(f"{over} in {samples} of {CONFIRM_STEPS} steps")
        k_next = _more_pruned(k, k_min)
        reason = f"{over}: {_move(k, k_next, 'density.min')}"
        return _Choice(k_next, Cause.OVER_BUDGET, reason, adjusting=False, pressed=pressed)

    within = f"{learning}, step {step_s:.3f} s within {budget_s:.3f} s"
    k_next = _less_pruned(k, k_max)
    if not adjusting or k_next == k:
        return hold(within, adjusting=False, pressed=False)
    next_s = _predict_step_s(state, signals, known.estimate, k, k_next, step_s)
    if next_s is None:
        return hold(within, pressed=False)
    if next_s > budget_s:
        text = f"{within}, but {next_s:.3f} s at {k_next / CHUNK_NUMEL:.4f}"
        return hold(text, adjusting=samples < CONFIRM_STEPS, pressed=False)
    reason = f"faster network, step {next_s:.3f} s predicted within {budget_s:.3f} s: "
    return _Choice(
        k_next, Cause.NETWORK_CHANGED, reason + _move(k, k_next, "density.max"), adjusting=True
    )


def _predict_step_s(
    state: StepwiseState,
    signals: StepSignals,
    estimate: link.LinkEstimate,
    k: int,
    k_next: int,
    step_s: float,
) -> float | None:
    """Step time at `k_next`; None when the newest times are not of this density."""
    if signals.timed_density != state.density or signals.wire_bytes <= 0:
        return None
    # Headers and dense segments do not grow with k: this is the most it can be.
    next_bytes = math.ceil(signals.wire_bytes * k_next / k)
    if k_next == CHUNK_NUMEL:
        next_bytes = signals.dense_bytes
    now_s, next_s = estimate.predict_s(signals.wire_bytes), estimate.predict_s(next_bytes)
    if now_s is None or next_s is None:
        return None
    return step_s + next_s - now_s


def _less_pruned(k: int, k_max: int) -> int:
    return min(k_max, math.ceil(k / STEP_FACTOR))  # at least k + 1, for any k >= 1


def _more_pruned(k: int, k_min: int) -> int:
    return max(k_min, min(k - 1, math.ceil(k * STEP_FACTOR)))


def _move(k: int, k_next: int, bound: str) -> str:
    if k_next == k:
        return f"already at {bound}, hold at {k / CHUNK_NUMEL:.4f}"
    return f"density {k / CHUNK_NUMEL:.4f} -> {k_next / CHUNK_NUMEL:.4f}"


def _rate(estimate: link.LinkEstimate) -> str:
    if estimate.seconds_per_byte is None:
        return ""
    return f", now {1e-6 / estimate.seconds_per_byte:.3g} MB/s"
