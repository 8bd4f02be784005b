"""Ranges of numbers, and what a field of a pydantic model accepts. Knows no model of ours."""

from __future__ import annotations

import types
from collections.abc import Set
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError, PydanticKnownError

MAX_STEPS = 10**9
"""No run has more optimizer steps: a larger number is a slip."""

Step = Annotated[int, Field(ge=0, le=MAX_STEPS)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Density = Annotated[float, Field(ge=1e-6, le=1.0, allow_inf_nan=False)]
"""Kept / all elements. A kernel keeps at least one of 4096, so less than 1e-6 is a slip."""
Target = Annotated[float, Field(ge=-10.0, le=10.0, allow_inf_nan=False)]
"""A value of P(t): clean descent is +2, so a target beyond 10 is missed, or held, for ever."""
Share = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Pause = Annotated[float, Field(ge=0.0, le=3600.0, allow_inf_nan=False)]
Timeout = Annotated[float, Field(ge=0.1, le=86400.0, allow_inf_nan=False)]
"""Seconds. Below 0.5 ms torch would wait for ever; beyond some 1e10 its clocks overflow."""
Budget = Annotated[float, Field(gt=0.0, le=86400.0, allow_inf_nan=False)]
Megabit = Annotated[float, Field(ge=1e-3, le=1e7, allow_inf_nan=False)]


INTERVALS = (1, 2, 4, 8, 16, 32)
"""Steps from one exchange to the next among which `sync_every: "auto"` chooses."""

FIRST_INTERVAL = 4
"""Where it begins. It loses least at equal density."""

LEAST_LOSSES = 32
"""The window holds so many losses, however rare exchanges are. The noise of P among 32 is 0.23, and
a steady rise has -1.6. Among 16 it is 0.38, and six times as many misses are false."""

_Interval = Annotated[int, Field(ge=1, le=10**6)]
_INTERVAL: TypeAdapter[int] = TypeAdapter(_Interval)


def _number_or_auto(value: Any) -> Any:
    """One sentence says what is wrong, where a union would say one per member."""
    if value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PydanticCustomError("wrong_type", "{words}", {"words": 'a whole number or "auto"'})
    try:
        return _INTERVAL.validate_python(value)
    except ValidationError as exc:
        error: Any = exc.errors(include_url=False)[0]
        raise PydanticKnownError(error["type"], error.get("ctx")) from exc


SyncEvery = Annotated[_Interval | Literal["auto"], BeforeValidator(_number_or_auto)]


def has_auto(annotation: Any) -> bool:
    """Whether "auto" is one of the field's own values."""
    return any("auto" in get_args(p) for p in _parts(annotation) if get_origin(p) is Literal)


def accepted_types(annotation: Any) -> set[type]:
    """Python types a field accepts; empty where a list of literals says it all."""
    parts = _parts(annotation)
    if any(get_origin(part) is Literal for part in parts):
        return set()
    return {get_origin(part) or part for part in parts}


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, alone or as the members of a list; None for plain values."""
    for part in _parts(annotation):
        if get_origin(part) is list:
            return inner_model(get_args(part)[0])
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def words_of(accepted: Set[type]) -> str:
    """Python types as the words of a message, null last."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    names |= {list: "a list", types.NoneType: "null"}
    order = sorted(accepted, key=lambda kind: kind is types.NoneType)
    return " or ".join(names.get(kind, "a JSON object") for kind in order)


def _parts(annotation: Any) -> list[Any]:
    """The members of a union, each without its `Annotated`."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for member in get_args(annotation) for part in _parts(member)]
    return [annotation]
