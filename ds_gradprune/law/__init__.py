"""The control law: one exchange's signals in, density and interval of the next one out.

Pure: no clock, no torch.distributed, no logging, no global state. All ranks call it with the same
signals and so reach the same decision without talking. Knows nothing of tensors, and imports no
torch.

Two laws with one order of decisions: warm-up dense; P(t) misses its target: prune less; P holds and
the step time misses its budget: prune more; both hold: leave it. "stepwise" moves by a fixed factor
and measures again; "predictive", the default, moves to where the link model says the budget is met.

    signals, consensus     what ranks measure, and what all of them know
    learning, outliers     P(t) of the losses
    alarm, link_cost, codec_cost, network, prices     what a step costs at a density
    progress_model         how many steps a density costs
    warmup, opening        how a run begins
    schedule, interval, plan, loss_arm      parts of the decision
    predictive, stepwise   the laws
    decision               what they decide
    arithmetic, stats, state      same bits on every host; small statistics; checkpoints
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.errors import CheckpointError
from ds_gradprune.law import opening, predictive, stepwise
from ds_gradprune.law import state as plain
from ds_gradprune.law.arithmetic import fingerprint
from ds_gradprune.law.decision import Decision
from ds_gradprune.law.predictive import PredictiveState
from ds_gradprune.law.signals import RankSignals, StepSignals
from ds_gradprune.law.stepwise import StepwiseState

State: TypeAlias = PredictiveState | StepwiseState

__all__ = [
    "State",
    "asks_for_trial",
    "begin",
    "fingerprint",
    "restore",
    "start",
    "to_plain",
    "update",
]

_STATES: dict[str, type[PredictiveState] | type[StepwiseState]] = {
    "predictive": PredictiveState,
    "stepwise": StepwiseState,
}


def start(config: GradientPruningConfig) -> tuple[State, Decision]:
    """The state before any step, and the decision for step 1.

    Args:
        config: the validated block.

    Returns:
        State of the configured law, and decision.
    """
    return stepwise.start(config) if config.controller == "stepwise" else predictive.start(config)


def asks_for_trial(config: GradientPruningConfig, state: State) -> bool:
    """Whether a trial of the link before the first exchange would decide something."""
    return opening.is_open(config, state)


def begin(
    config: GradientPruningConfig,
    state: State,
    decision: Decision,
    ranks: Sequence[RankSignals],
) -> tuple[State, Decision]:
    """State and decision for step 1 after the link was tried; see `opening.begin`.

    Args:
        config: the validated block.
        state: as `start` gave it.
        decision: as `start` gave it.
        ranks: what all ranks said, in rank order; equal everywhere. `comm_time_s` is what a dense
            exchange would take there, `compute_time_s` forward and backward of the first step.
    """
    if isinstance(state, StepwiseState):
        return state, decision
    return opening.begin(config, state, decision, ranks) or (state, decision)


def update(
    config: GradientPruningConfig, state: State, signals: StepSignals
) -> tuple[State, Decision]:
    """Take in one exchange's signals and decide for the next one.

    Args:
        config: the validated block.
        state: what the last call returned; its density is the one that `signals.step` used.
        signals: what all ranks agreed on in `signals.step`.

    Returns:
        The new state, and the decision for the next exchange.
    """
    if isinstance(state, StepwiseState):
        return stepwise.update(config, state, signals)
    return predictive.update(config, state, signals)


def to_plain(state: State) -> dict[str, Any]:
    """A state as plain JSON types, with the name of its law; `restore` reads it."""
    law = next(law for law, kind in _STATES.items() if isinstance(state, kind))
    return {"law": law, **plain.to_plain(state)}


def restore(config: GradientPruningConfig, data: Any) -> State:
    """The state that `to_plain` wrote.

    Args:
        config: the validated block of the run that goes on.
        data: plain JSON types.

    Raises:
        CheckpointError: the data is no state, or one of the other law.
    """
    saved = data.get("law") if isinstance(data, Mapping) else None
    if saved not in tuple(_STATES):
        known = " or ".join(f'"{law}"' for law in _STATES)
        raise CheckpointError(
            f"law.law must be {known}, got {saved!r}. Resume from another checkpoint, or with the "
            "release that wrote this one."
        )
    if saved != config.controller:
        raise CheckpointError(
            f'gradient_pruning.controller must be "{saved}", the law that the checkpoint was saved '
            f'with, got "{config.controller}". Set it so to resume.'
        )
    fields = {name: value for name, value in data.items() if name != "law"}
    return plain.from_plain(_STATES[saved], fields, "law")
