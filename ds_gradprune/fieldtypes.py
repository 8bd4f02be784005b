"""What a field of a pydantic model accepts, read from its annotation. Knows no model."""

from __future__ import annotations

import types
from collections.abc import Set
from typing import Annotated, Any, Literal, Union, get_args, get_origin


def _parts(annotation: Any) -> list[Any]:
    """The members of a union, each without its `Annotated`."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for member in get_args(annotation) for part in _parts(member)]
    return [annotation]


def has_auto(annotation: Any) -> bool:
    """Whether "auto" is one of the field's own values."""
    return any("auto" in get_args(p) for p in _parts(annotation) if get_origin(p) is Literal)


def accepted_types(annotation: Any) -> set[type]:
    """Python types a field accepts; empty where a list of literals says it all."""
    parts = _parts(annotation)
    if any(get_origin(part) is Literal for part in parts):
        return set()
    return {get_origin(part) or part for part in parts}


def wording(accepted: Set[type]) -> str:
    """Python types as the words of a message, null last."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    names |= {list: "a list", types.NoneType: "null"}
    order = sorted(accepted, key=lambda kind: kind is types.NoneType)
    return " or ".join(names.get(kind, "a JSON object") for kind in order)
