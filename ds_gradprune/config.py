"""The `gradient_pruning` block of ds_config.json: models, ranges, messages.

Knows nothing of DeepSpeed. The models mirror its habits (`extra="forbid"`, a value of "auto" means
the default), on pydantic itself, because importing this package must not import deepspeed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from ds_gradprune.errors import ConfigError

BLOCK = "gradient_pruning"
"""Name of our top-level key in ds_config.json."""

_NOT_YET: dict[str, dict[str, str]] = {
    "prune": {"update": '"gradient"'},
    "controller": {"predictive": '"stepwise"'},
    "exchange": {"owner_reduce": '"all_gather" or "auto"', "two_level": '"all_gather" or "auto"'},
    "transport": {"mpi": '"torch"'},
    "two_level": {"True": '"auto" or false'},
    "value_bits": {"1": "16 or 32", "2": "16 or 32", "4": "16 or 32", "8": "16 or 32"},
}
"""Planned values: field -> {value: what to use today}. Rejected by name, never ignored."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Density = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_auto(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        own = {name for name, field in cls.model_fields.items() if _accepts_auto(field)}
        return {key: v for key, v in data.items() if not (v == "auto" and key not in own)}

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _types(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        planned = _NOT_YET.get(info.field_name or "", {})
        if not isinstance(value, (dict, list)) and str(value) in planned:
            raise ValueError(f"not supported yet|{planned[str(value)]}")
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and annotation is not bool and not _accepts_bool(annotation):
            raise ValueError("wrong type|a number")
        if isinstance(value, str) and _is_number(annotation):
            raise ValueError("wrong type|a number")
        if not isinstance(value, bool) and annotation is bool:
            raise ValueError("wrong type|true or false")
        return value


def _accepts_auto(field: Any) -> bool:
    return "auto" in str(field.annotation)


def _accepts_bool(annotation: Any) -> bool:
    return "bool" in str(annotation) or "Literal" in str(annotation)


def _is_number(annotation: Any) -> bool:
    text = str(annotation)
    return ("int" in text or "float" in text) and "str" not in text and "Literal" not in text


class DensityConfig(_Block):
    """Kept / all elements: where the controller starts and how far it may go."""

    initial: Density = Field(0.05, description="density after warm-up and ramp")
    min: Density = Field(0.001, description="the controller never goes below; lower = fewer bytes")
    max: Density = Field(0.25, description="the controller never goes above, except to dense")


class LinkPoint(_Block):
    """One point of an emulated link's schedule; holds from `step` on."""

    step: int = Field(0, ge=0, description="optimizer step from which this point holds")
    rate_mbit: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = Field(
        ..., description="rate of each rank's link, megabit (10^6 bit) per second, each direction"
    )
    latency_s: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = Field(
        0.0, description="added once per collective, seconds"
    )
    outage_s: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = Field(
        0.0, description="the link is dead for so many seconds when this point begins"
    )


class ThrottleConfig(_Block):
    """Emulates a slow link on one machine, for laptops and tests."""

    schedule: list[LinkPoint] = Field(..., min_length=1, description="points in order of step")


class GradientPruningConfig(_Block):
    """The whole block. Every field's description is the README's table."""

    enabled: bool = Field(True, description="false leaves DeepSpeed untouched, byte for byte")
    prune: Literal["gradient"] = Field("gradient", description="what is pruned")
    warmup_steps: int = Field(200, ge=0, description="first steps, exactly DeepSpeed's dense path")
    ramp_steps: int = Field(
        100,
        ge=0,
        description="steps after warm-up in which density falls from max to initial, geometrically",
    )
    window_size: int = Field(128, ge=4, description="M: losses in the window of P(t), steps")
    performance_target: Finite = Field(0.0, description="P(t) below it: prune less")
    performance_form: Literal["edge", "literal"] = Field("edge", description="formula of P(t)")
    step_time_budget_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = Field(
        None,
        description="a step may take so many seconds; null: communication and codec may cost at most 10 % of the "
        "measured compute time",
    )
    controller: Literal["stepwise"] = Field("stepwise", description="control law")
    density: DensityConfig = Field(
        default_factory=lambda: DensityConfig(), description="kept / all elements; see below"
    )
    value_bits: Literal[16, 32] = Field(16, description="bits of a value on the wire: bf16 or fp32")
    error_feedback: bool = Field(
        True, description="what is not sent is added to the next step's gradient"
    )
    min_numel: int = Field(4096, ge=1, description="smaller or 1-D tensors are sent whole")
    exchange: Literal["auto", "all_gather"] = Field("auto", description="who sends what to whom")
    transport: Literal["torch"] = Field("torch", description="what moves the bytes")
    two_level: Literal["auto", False] = Field("auto", description="dense inside a host first")
    timeout_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = Field(
        600.0, description="an exchange without answer for so long is an error"
    )
    verify_every_steps: Annotated[int, Field(ge=1)] | None = Field(
        100, description="compare a hash of all parameters across ranks so often; null: never"
    )
    log_path: str | None = Field(
        None, description="rank 0 writes every step's signals and decision here, JSON lines"
    )
    throttle: ThrottleConfig | None = Field(
        None, description="emulate a slow link, for laptops and tests; see below"
    )


def load_block(ds_config: Mapping[str, Any], total_steps: int | None = None) -> GradientPruningConfig:
    """Validate the block of a parsed ds_config.json.

    Args:
        ds_config: the whole DeepSpeed configuration, already parsed.
        total_steps: optimizer steps of the run, if the caller knows them.

    Returns:
        The validated, frozen configuration.

    Raises:
        ConfigError: the block is missing or wrong; lists every fault at once.
    """
    block = ds_config.get(BLOCK)
    if block is None:
        near = difflib.get_close_matches(BLOCK, [str(key) for key in ds_config], n=1, cutoff=0.6)
        hint = f' The key "{near[0]}" is not read: did you mean "{BLOCK}"?' if near else ""
        raise ConfigError(
            f'{BLOCK} must be present in the DeepSpeed configuration.{hint} Add "{BLOCK}": {{}} for '
            f'the defaults, or {{"enabled": false}} to train without pruning.'
        )
    if not isinstance(block, Mapping):
        raise ConfigError(f"{BLOCK} must be a JSON object, got {block!r}.")
    try:
        config = GradientPruningConfig.model_validate(dict(block))
    except pydantic.ValidationError as exc:
        raise ConfigError([_sentence(error) for error in exc.errors()]) from exc
    faults = _cross_field_faults(config, total_steps)
    if faults:
        raise ConfigError(faults)
    return config


def _cross_field_faults(config: GradientPruningConfig, total_steps: int | None) -> list[str]:
    faults = []
    density = config.density
    if not density.min <= density.max:
        faults.append(
            f"{BLOCK}.density.min must be at most density.max ({density.max:g}), got {density.min:g}."
        )
    elif not density.min <= density.initial <= density.max:
        faults.append(
            f"{BLOCK}.density.initial must lie between density.min ({density.min:g}) and "
            f"density.max ({density.max:g}), got {density.initial:g}."
        )
    if config.throttle is not None:
        steps = [point.step for point in config.throttle.schedule]
        if any(b <= a for a, b in zip(steps, steps[1:], strict=False)):
            faults.append(f"{BLOCK}.throttle.schedule must have rising steps, got {steps}.")
        if steps[0] != 0:
            faults.append(
                f"{BLOCK}.throttle.schedule must begin at step 0, got {steps[0]}. "
                "Add a point with step 0."
            )
    if total_steps is not None and config.enabled and config.window_size >= total_steps:
        faults.append(
            f"{BLOCK}.window_size must be less than the run's {total_steps} steps, got "
            f"{config.window_size}. P(t) would never be known; use at most {max(4, total_steps // 4)}."
        )
    return faults


def _sentence(error: Any) -> str:
    """One pydantic error as: path, rule, value, fix."""
    path, model = BLOCK, GradientPruningConfig
    known: list[str] = sorted(model.model_fields)
    inner: type[BaseModel] | None = model
    for part in error["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    for part in error["loc"][:-1]:
        if isinstance(part, str) and inner is not None and part in inner.model_fields:
            inner = _INNER.get(part)
    if inner is not None:
        known = sorted(inner.model_fields)
    value, ctx = error["input"], error.get("ctx", {})
    kind = error["type"]
    if kind == "extra_forbidden":
        name = str(error["loc"][-1])
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f'Did you mean "{near[0]}"?' if near else f"Known keys: {', '.join(known)}."
        return f"{path} is not a known key. {hint}"
    if kind == "missing":
        return f"{path} must be given. {_describe(inner, error['loc'][-1])}".rstrip()
    if kind == "value_error" and "|" in str(ctx.get("error", "")):
        rule, _, fix = str(ctx["error"]).partition("|")
        if rule == "not supported yet":
            return f"{path} = {_json(value)} is not supported yet. Use {fix}."
        return f"{path} must be {fix}, got {_json(value)}."
    return f"{path} must {_rule(kind, ctx, error['msg'])}, got {_json(value)}."


_INNER: dict[str, type[BaseModel]] = {
    "density": DensityConfig,
    "throttle": ThrottleConfig,
    "schedule": LinkPoint,
}


def _rule(kind: str, ctx: Mapping[str, Any], message: str) -> str:
    bounds = {
        "greater_than": "be greater than {gt:g}",
        "greater_than_equal": "be at least {ge:g}",
        "less_than_equal": "be at most {le:g}",
        "less_than": "be less than {lt:g}",
        "too_short": "have at least {min_length} entry",
        "literal_error": "be {expected}",
    }
    if kind in bounds:
        return bounds[kind].format(**ctx).replace("'", '"')
    names = {
        "int": "be a whole number",
        "float": "be a number",
        "finite": "be a finite number",
        "string": "be a string",
        "bool": "be true or false",
        "list": "be a list",
        "model": "be a JSON object",
        "dict": "be a JSON object",
    }
    for prefix, rule in names.items():
        if kind.startswith(prefix):
            return rule
    return message[0].lower() + message[1:]


def _describe(model: type[BaseModel] | None, name: Any) -> str:
    if model is None or name not in model.model_fields:
        return ""
    return f"Meaning: {model.model_fields[name].description}."


def _json(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return f'"{value}"' if isinstance(value, str) else repr(value)
