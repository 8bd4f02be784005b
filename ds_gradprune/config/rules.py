"""What must fit together: rules between the fields of a block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set

from ds_gradprune.config.model import BLOCK, DensityConfig, GradientPruningConfig
from ds_gradprune.config.wording import shown

_ONLY_UPDATE = (
    "sync_every",
    "residual",
    "residual_decay",
    "update_scale",
    "slow_momentum",
    "warmup",
    "shared_device",
    "min_islands",
)
"""Keys that mean nothing with pruned gradients: there they are refused, not ignored."""

_HARMLESS = {("warmup", "dense")}
"""Values that say what holds with pruned gradients anyway."""


def cross_field_faults(
    config: GradientPruningConfig, total_steps: int | None, faulty: Set[str]
) -> list[str]:
    """One sentence for every rule that is broken.

    Args:
        config: the block, its faulty fields at their defaults.
        total_steps: optimizer steps of the run; None: unknown.
        faulty: fields that have their sentence already; rules leave them alone.
    """
    faults = []
    if "density" not in faulty:
        faults += _density_faults(config.density)
    if "prune" not in faulty:
        faults += _gradient_faults(config) if config.prune == "gradient" else _update_faults(config)
    if config.performance_target_schedule is not None:
        path = f"{BLOCK}.performance_target_schedule"
        faults += _order_faults(path, [point.step for point in config.performance_target_schedule])
    if config.clip_to_median is not None and config.exchange == "owner_reduce":
        faults.append(
            f'{BLOCK}.clip_to_median must be null with exchange = "owner_reduce", got '
            f"{shown(config.clip_to_median)}. Owners deliver sums, and nobody sees who sent what. "
            'Leave it out, or set exchange to "all_gather".'
        )
    if config.throttle is not None:
        faults += _link_faults([point.step for point in config.throttle.schedule])
    if total_steps is not None and config.enabled and not faulty & {"enabled", "window_size"}:
        faults += _window_faults(config, total_steps)
    return faults


def _gradient_faults(config: GradientPruningConfig) -> list[str]:
    faults = []
    for name in _ONLY_UPDATE:
        field = type(config).model_fields[name]
        value, default = getattr(config, name), field.get_default(call_default_factory=True)
        if value != default and (name, value) not in _HARMLESS:
            faults.append(
                f'{BLOCK}.{name} must be {shown(default)} with prune = "gradient", got '
                f'{shown(value)}. Leave it out, or set prune to "update".'
            )
    return faults


def _update_faults(config: GradientPruningConfig) -> list[str]:
    faults = []
    if not config.error_feedback:
        faults.append(
            f'{BLOCK}.error_feedback must be true with prune = "update", got false. An island '
            'keeps what it has not sent. Leave it out, or set prune to "gradient".'
        )
    if config.sync_every == "auto":
        faults += _auto_faults(config)
    if config.min_islands is not None:
        faults += _lost_faults(config)
    default = GradientPruningConfig.model_fields["residual_decay"].default
    if config.residual_form == "used" and config.residual_decay != default:
        faults.append(
            f'{BLOCK}.residual_decay must be {shown(default)} where the residual is "used", got '
            f'{shown(config.residual_decay)}. Leave it out, or set residual to "reset".'
        )
    return faults


def _lost_faults(config: GradientPruningConfig) -> list[str]:
    """Islands that may be lost."""
    return [
        f'{BLOCK}.{name} must be "{value}" with min_islands, got "{other}". What another island '
        "was to add up, or MPI's processes, cannot be lost. Leave it out, or leave min_islands out."
        for name, value, other in (
            ("exchange", "all_gather", "owner_reduce"),
            ("transport", "torch", "mpi"),
        )
        if getattr(config, name) == other
    ]


def _auto_faults(config: GradientPruningConfig) -> list[str]:
    """An interval that the law changes."""
    faults = []
    if config.residual == "used":
        faults.append(
            f'{BLOCK}.residual must be "reset" or null with sync_every = "auto", got "used". One '
            "form must serve all intervals. Leave it out, or set sync_every to a number."
        )
    if config.controller != "predictive":
        faults.append(
            f'{BLOCK}.controller must be "predictive" with sync_every = "auto", got '
            f"{shown(config.controller)}. Leave it out, or set sync_every to a number."
        )
    return faults


def _density_faults(density: DensityConfig) -> list[str]:
    path = f"{BLOCK}.density"
    if density.min > density.max:
        rule = f"be at most density.max ({density.max:g})"
        return [f"{path}.min must {rule}, got {density.min:g}."]
    if not density.min <= density.initial <= density.max:
        rule = f"lie between density.min ({density.min:g}) and density.max ({density.max:g})"
        return [f"{path}.initial must {rule}, got {density.initial:g}."]
    return []


def _link_faults(steps: Sequence[int]) -> list[str]:
    path, faults = f"{BLOCK}.throttle.schedule", []
    if steps[0] != 0:
        faults.append(
            f"{path}[0].step must be 0, got {steps[0]}. Say how fast the link is at the start."
        )
    return faults + _order_faults(path, steps)


def _order_faults(path: str, steps: Sequence[int]) -> list[str]:
    if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        return [f"{path} must have rising steps, got {shown(list(steps))}."]
    return []


def _window_faults(config: GradientPruningConfig, total_steps: int) -> list[str]:
    """One loss enters the window in every step, or, between islands, at every exchange.

    The window is meant in steps, so it holds fewer losses then.
    """
    alone = max(0, total_steps - config.warmup_steps)
    num_losses = total_steps - alone + alone // config.first_interval
    if config.window_losses(config.first_interval) < num_losses:
        return []
    run = f"{total_steps} steps"
    if num_losses < total_steps:
        run = f"{num_losses} exchanges in {run}"
    fix = f"use at most {num_losses // 4}" if num_losses >= 16 else "train for more steps"
    return [
        f"{BLOCK}.window_size must be less than the run's {run}, got {config.window_size}. "
        f"With fewer losses P(t) is never known: {fix}."
    ]
