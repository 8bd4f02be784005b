"""The `gradient_pruning` block of ds_config.json: models, ranges, messages.

Knows nothing of DeepSpeed. The models mirror its habits (unknown keys are errors, a value of "auto"
means the default), on pydantic itself, because importing this package must not import deepspeed.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Mapping, Set
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from ds_gradprune.errors import ConfigError
from ds_gradprune.fieldtypes import accepted_types, has_auto, wording

BLOCK = "gradient_pruning"
"""Name of our top-level key in ds_config.json."""

_SPARSE_TODAY = '"all_gather" or "auto"'
_BITS_TODAY = "2, 4, 16 or 32"
_NOT_YET: dict[str, dict[str, str]] = {
    "exchange": {'"owner_reduce"': _SPARSE_TODAY, '"two_level"': _SPARSE_TODAY},
    "two_level": {"true": '"auto" or false'},
    "value_bits": {"1": _BITS_TODAY, "8": _BITS_TODAY},
}
"""Planned values: field -> {value as JSON: what to use today}. Rejected by name, never ignored."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Density = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_auto(cls, data: Any) -> Any:
        """As in DeepSpeed's blocks, "auto" stands for the default, unless it is a value itself."""
        if not isinstance(data, Mapping):
            return data
        own = {name for name, field in cls.model_fields.items() if has_auto(field.annotation)}
        return {key: value for key, value in data.items() if value != "auto" or key in own}

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _refuse(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """Refuse planned values by name, and types that pydantic would convert: true -> 1."""
        name = info.field_name or ""
        planned = _NOT_YET.get(name, {})
        if isinstance(value, (str, int)) and _json(value) in planned:
            raise ValueError(f"not supported yet|{planned[_json(value)]}")
        accepted = accepted_types(cls.model_fields[name].annotation)
        converted = isinstance(value, (bool, str)) or bool in accepted
        if accepted and converted and type(value) not in accepted:
            raise ValueError(f"wrong type|{wording(accepted)}")
        return value


class DensityConfig(_Block):
    """Kept / all elements: where the controller starts and how far it may go."""

    initial: Density = Field(default=0.05, description="density after warm-up and ramp")
    min: Density = Field(
        default=0.001, description="the controller never goes below it; lower = fewer bytes"
    )
    max: Density = Field(
        default=0.25,
        description="the controller never goes above it, but to dense where that fits the budget "
        "or is faster; the ramp begins here; min = max pins the density",
    )


class LinkPoint(_Block):
    """One point of an emulated link's schedule; holds from `step` on."""

    step: int = Field(default=0, ge=0, description="optimizer step from which this point holds")
    rate_mbit: Positive = Field(
        ..., description="rate of each rank's link, each direction, megabit (10^6 bit) per second"
    )
    latency_s: NonNegative = Field(default=0.0, description="added once per collective, seconds")
    outage_s: NonNegative = Field(
        default=0.0, description="the link is dead for so many seconds when this point begins"
    )


class TargetPoint(_Block):
    """One point of a schedule for the performance target; holds from `step` on."""

    step: int = Field(default=0, ge=0, description="optimizer step from which this point holds")
    target: Finite = Field(..., description="P(t) below it: prune less")


class ThrottleConfig(_Block):
    """Emulates a slow link on one machine, for laptops and tests."""

    schedule: list[LinkPoint] = Field(..., min_length=1, description="points in order of step")


class GradientPruningConfig(_Block):
    """The whole block. The fields' descriptions are the README's table."""

    enabled: bool = Field(default=True, description="false leaves DeepSpeed untouched")
    prune: Literal["gradient", "update"] = Field(
        default="update", description="what is pruned and exchanged, see Two modes"
    )
    sync_every: int = Field(
        default=1,
        ge=1,
        description="with update: optimizer steps from one exchange to the next, after warm-up",
    )
    update_scale: Positive | None = Field(
        default=None,
        description="with update: factor on the islands' mean update; null: the square root of "
        "their number",
    )
    slow_momentum: NonNegative = Field(
        default=0.0,
        description="with update: share of the average of the last 100 steps' moves of the shared "
        "weights that each exchange adds to them; 0: off",
    )
    warmup_steps: int = Field(
        default=200, ge=0, description="first steps, exactly DeepSpeed's dense path"
    )
    ramp_steps: int = Field(
        default=100,
        ge=0,
        description="steps after warm-up in which density falls from max to initial, geometrically",
    )
    window_size: int = Field(
        default=128, ge=4, description="M, the number of losses in the window of P(t)"
    )
    performance_target: Finite = Field(default=0.0, description="P(t) below it: prune less")
    performance_target_schedule: Annotated[list[TargetPoint], Field(min_length=1)] | None = Field(
        default=None,
        description="targets of later steps, points in order of step; before the first one, and "
        "with null, `performance_target` holds",
    )
    performance_form: Literal["edge", "literal"] = Field(
        default="edge", description="formula of P(t)"
    )
    step_time_budget_s: Positive | None = Field(
        default=None,
        description="a step may take so many seconds; null: what a step takes at the density that "
        "learns most per second (stepwise: 1.1 times computation and codec)",
    )
    controller: Literal["predictive", "stepwise"] = Field(
        default="predictive",
        description="control law: predictive goes to the right density at once, stepwise by fixed "
        "factors",
    )
    density: DensityConfig = Field(
        default_factory=DensityConfig, description="kept / all elements, see below"
    )
    value_bits: Literal[2, 4, 16, 32] = Field(
        default=4,
        description="bits of a value on the wire: 32 is fp32, 16 bf16; 4 and 2 are levels with two "
        "bf16 scales per 128 values. What rounding loses stays in the residual",
    )
    error_feedback: bool = Field(
        default=True, description="what is not sent is added to the next step's gradient"
    )
    min_numel: int = Field(
        default=4096, ge=1, description="tensors that are smaller, or 1-D, are sent whole"
    )
    exchange: Literal["auto", "all_gather"] = Field(
        default="auto", description="who sends what to whom; auto is all_gather"
    )
    transport: Literal["torch", "mpi"] = Field(
        default="torch",
        description="what moves the bytes: torch.distributed, or MPI, which must have started the "
        "processes; dense steps stay with torch.distributed",
    )
    two_level: Literal["auto", False] = Field(
        default="auto", description="dense inside a host first; auto is false"
    )
    timeout_s: Positive = Field(
        default=600.0,
        description="no answer in an exchange, or of a rank at the start, for so long: an error",
    )
    verify_every_steps: Annotated[int, Field(ge=1)] | None = Field(
        default=100,
        description="compare a hash of all parameters across ranks so often; null: never",
    )
    log_path: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="rank 0 writes every step's signals and decision here, JSON lines",
    )
    throttle: ThrottleConfig | None = Field(
        default=None, description="emulate a slow link, for laptops and tests, see below"
    )


def load_block(
    ds_config: Mapping[str, Any], total_steps: int | None = None
) -> GradientPruningConfig:
    """Validate the block of a parsed ds_config.json.

    Args:
        ds_config: the whole DeepSpeed configuration, already parsed.
        total_steps: optimizer steps of the run, if the caller knows them.

    Returns:
        The validated, frozen configuration.

    Raises:
        ConfigError: the block is missing or wrong; lists every fault at once.
    """
    if BLOCK not in ds_config:
        near = difflib.get_close_matches(BLOCK, [str(key) for key in ds_config], n=1, cutoff=0.6)
        hint = f' The key "{near[0]}" is not read: did you mean "{BLOCK}"?' if near else ""
        raise ConfigError(
            f'{BLOCK} must be present in the DeepSpeed configuration.{hint} Add "{BLOCK}": {{}} '
            f'for the defaults, or {{"enabled": false}} to train without pruning.'
        )
    block = ds_config[BLOCK]
    if not isinstance(block, Mapping):
        raise ConfigError(f"{BLOCK} must be a JSON object, got {_json(block)}.")
    block = {str(key): value for key, value in block.items()}
    faults: list[str] = []
    faulty: set[str] = set()
    try:
        config = GradientPruningConfig.model_validate(block)
    except pydantic.ValidationError as exc:
        faults = [_sentence(error) for error in exc.errors()]
        faulty = {str(error["loc"][0]) for error in exc.errors()}
        # What is right in itself may still not fit together: that is said in the same message.
        sound = {key: value for key, value in block.items() if key not in faulty}
        config = GradientPruningConfig.model_validate(sound)
    faults += _cross_field_faults(config, total_steps, faulty)
    if faults:
        raise ConfigError(faults)
    return config


def _cross_field_faults(
    config: GradientPruningConfig, total_steps: int | None, faulty: Set[str]
) -> list[str]:
    """Rules between fields; `faulty` fields are left alone, they have their sentence already."""
    faults = []
    if "density" not in faulty:
        faults += _density_faults(config.density)
    faults += _mode_faults(config, faulty)
    if config.performance_target_schedule is not None:
        path = f"{BLOCK}.performance_target_schedule"
        faults += _order_faults(path, [point.step for point in config.performance_target_schedule])
    if config.throttle is not None:
        faults += _schedule_faults([point.step for point in config.throttle.schedule])
    if total_steps is not None and config.enabled and not faulty & {"enabled", "window_size"}:
        alone = max(0, total_steps - config.warmup_steps)
        num_losses = total_steps - alone + alone // config.sync_every
        faults += _window_faults(config.window_size, total_steps, num_losses)
    return faults


def _mode_faults(config: GradientPruningConfig, faulty: Set[str]) -> list[str]:
    """Keys that mean nothing in the other mode are refused, not ignored."""
    faults = []
    if config.prune == "gradient" and not faulty & {"prune"}:
        only = 'Leave it out, or set prune to "update".'
        if config.sync_every != 1:
            faults.append(
                f'{BLOCK}.sync_every must be 1 with prune = "gradient", got {config.sync_every}. '
                + only
            )
        if config.update_scale is not None:
            faults.append(
                f'{BLOCK}.update_scale must be null with prune = "gradient", got '
                f"{config.update_scale:g}. {only}"
            )
        if config.slow_momentum:
            faults.append(
                f'{BLOCK}.slow_momentum must be 0 with prune = "gradient", got '
                f"{config.slow_momentum:g}. {only}"
            )
    if config.prune == "update" and not config.error_feedback:
        faults.append(
            f'{BLOCK}.error_feedback must be true with prune = "update", got false. What is not '
            'sent stays in the island\'s own weights. Leave it out, or set prune to "gradient".'
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


def _schedule_faults(steps: list[int]) -> list[str]:
    path, faults = f"{BLOCK}.throttle.schedule", []
    if steps[0] != 0:
        faults.append(
            f"{path}[0].step must be 0, got {steps[0]}. Say how fast the link is at the start."
        )
    return faults + _order_faults(path, steps)


def _order_faults(path: str, steps: list[int]) -> list[str]:
    if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        return [f"{path} must have rising steps, got {steps}."]
    return []


def _window_faults(window_size: int, total_steps: int, num_losses: int) -> list[str]:
    """One loss enters the window in every step, or, between islands, at every exchange."""
    if window_size < num_losses:
        return []
    run = f"{total_steps} steps"
    if num_losses < total_steps:
        run = f"{num_losses} exchanges in {run}"
    fix = f"use at most {num_losses // 4}" if num_losses >= 16 else "train for more steps"
    return [
        f"{BLOCK}.window_size must be less than the run's {run}, got {window_size}. "
        f"With fewer losses P(t) is never known: {fix}."
    ]


def _sentence(error: Any) -> str:
    """One pydantic error as: path, rule, value, fix."""
    location, value, context = error["loc"], error["input"], error.get("ctx", {})
    path = BLOCK + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location)
    model, name = _model_at(location[:-1]), str(location[-1])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0.5)
        known = ", ".join(sorted(model.model_fields))
        hint = f'Did you mean "{near[0]}"?' if near else f"Known keys: {known}."
        return f"{path} is not a known key. {hint}"
    if error["type"] == "missing":
        return f"{path} must be given: {model.model_fields[name].description}."
    if error["type"] == "value_error":
        rule, _, fix = str(context["error"]).partition("|")
        if rule == "not supported yet":
            return f"{path} = {_json(value)} is not supported yet. Use {fix}."
        return f"{path} must be {fix}, got {_json(value)}."
    return f"{path} must {_rule(error['type'], context, error['msg'])}, got {_json(value)}."


def _model_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    """The model that holds the field at a path such as ("throttle", "schedule", 0)."""
    inner: dict[str, type[BaseModel]] = {
        "density": DensityConfig,
        "throttle": ThrottleConfig,
        "schedule": LinkPoint,
        "performance_target_schedule": TargetPoint,
    }
    names = [part for part in location if isinstance(part, str)]
    return inner[names[-1]] if names else GradientPruningConfig


def _rule(kind: str, context: Mapping[str, Any], message: str) -> str:
    bounds = {
        "greater_than": "be greater than {gt:g}",
        "greater_than_equal": "be at least {ge:g}",
        "less_than_equal": "be at most {le:g}",
        "string_too_short": "not be empty",
        "too_short": "have at least {min_length} entry",
    }
    if kind in bounds:
        return bounds[kind].format(**context)
    if kind == "literal_error":
        return "be " + str(context["expected"]).replace("'", '"').replace("False", "false")
    names = {
        "int": "be a whole number",
        "float": "be a number",
        "finite": "be a finite number",
        "string": "be a string",
        "list": "be a list",
        "model": "be a JSON object",
    }
    for prefix, rule in names.items():
        if kind.startswith(prefix):
            return rule
    return message[0].lower() + message[1:]


def _json(value: Any) -> str:
    """A value as the user wrote it, cut to one line's length."""
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
