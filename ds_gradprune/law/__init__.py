"""The control law: one step's signals in, the density of the next step out.

Pure: no clock, no torch.distributed, no logging, no global state. All ranks call it with the same
signals and so reach the same decision without talking. Knows nothing of tensors.

Two laws with one order of decisions: warm-up dense; P(t) misses its target: prune less; P holds and
the step time misses its budget: prune more; both hold: leave it. "stepwise" moves by a fixed factor
and measures again; "predictive", the default, moves to where the link model says the budget is met.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from ds_gradprune.config import GradientPruningConfig
from ds_gradprune.controller import predictive, stepwise
from ds_gradprune.controller.base import kept_per_chunk
from ds_gradprune.controller.state import PredictiveState
from ds_gradprune.controller.stepwise import StepwiseState
from ds_gradprune.errors import CheckpointError
from ds_gradprune.records import Decision, StepSignals

State: TypeAlias = PredictiveState | StepwiseState

__all__ = ["State", "kept_per_chunk", "restore", "start", "update"]


def start(config: GradientPruningConfig) -> tuple[State, Decision]:
    """The state before any step, and the decision for step 1.

    Args:
        config: the validated block.

    Returns:
        State of the configured law, and decision.
    """
    return stepwise.start(config) if config.controller == "stepwise" else predictive.start(config)


def update(
    config: GradientPruningConfig, state: State, signals: StepSignals
) -> tuple[State, Decision]:
    """Take in one step's signals and decide for the step after it.

    Args:
        config: the validated block.
        state: what the last call returned; its density is the one that `signals.step` used.
        signals: what all ranks agreed on in `signals.step`.

    Returns:
        The new state, and the decision for step `signals.step + 1`.
    """
    if isinstance(state, StepwiseState):
        return stepwise.update(config, state, signals)
    return predictive.update(config, state, signals)


def restore(config: GradientPruningConfig, data: Mapping[str, Any]) -> State:
    """The state whose `to_json` wrote `data`.

    Raises:
        CheckpointError: the data is no state, or one of the other law.
    """
    saved = data.get("law")
    if saved in ("predictive", "stepwise") and saved != config.controller:
        raise CheckpointError(
            f'gradient_pruning.controller must be "{saved}", the law that the checkpoint was saved '
            f'with, got "{config.controller}". Set it so to resume.'
        )
    if config.controller == "stepwise":
        return StepwiseState.from_json(data)
    return PredictiveState.from_json(data)
