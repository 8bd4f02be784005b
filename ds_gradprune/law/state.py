"""States as plain JSON types and back, by their type hints.

A state is a NamedTuple or a dataclass of numbers, strings, booleans, enums, optional values, tuples
and further states. `to_plain` writes dicts and lists, and `from_plain` reads them. What was written
on one host may be read on another or be damaged, so everything is checked before a run goes on with
it: every field is there and no other, has its type, is finite, and lies within the bounds of its
hint (`stats.Within`).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
from collections.abc import Mapping
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from ds_gradprune.errors import CheckpointError
from ds_gradprune.law.stats import Within

T = TypeVar("T")

_FIX = "Resume from another checkpoint, or with the release that wrote this one."


def to_plain(value: Any) -> Any:
    """A state as dicts, lists, numbers, strings, booleans and None."""
    names = _fields_of(type(value))
    if names is not None:
        return {name: to_plain(getattr(value, name)) for name in names}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def from_plain(kind: type[T], data: Any, path: str = "") -> T:
    """The state that `to_plain` wrote.

    Args:
        kind: type of the state.
        data: dicts and lists, as they come from JSON.
        path: what the state is called in a message; its type's name if empty.

    Returns:
        A state equal to the one that was written.

    Raises:
        CheckpointError: a field is missing, unknown, of another type, not finite or out of range.
            The message names its path.
    """
    return cast("T", _read(kind, data, path or kind.__name__))


def _fields_of(kind: Any) -> tuple[str, ...] | None:
    """The fields of a state in order; None of what is no state."""
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    return getattr(kind, "_fields", None) if isinstance(kind, type) else None


@functools.lru_cache(maxsize=64)
def _hints_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _read(kind: Any, data: Any, path: str, bounds: Within | None = None) -> Any:
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *extras = get_args(kind)
        return _read(inner, data, path, next((x for x in extras if isinstance(x, Within)), None))
    if origin in (Union, types.UnionType):
        return _read_optional(kind, data, path)
    if origin is tuple:
        return _read_tuple(get_args(kind), data, path)
    if origin is Literal:
        return _read_choice(get_args(kind), data, path)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(_read_choice([member.value for member in kind], data, path))
    names = _fields_of(kind)
    if names is not None:
        return _read_fields(kind, names, data, path)
    return _read_simple(kind, data, path, bounds)


def _read_fields(kind: Any, names: tuple[str, ...], data: Any, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise _wrong(path, "be a JSON object", data)
    missing = [name for name in names if name not in data]
    if missing:
        raise _wrong(f"{path}.{missing[0]}", "be there", "nothing")
    unknown = sorted(set(map(str, data)) - set(names))
    if unknown:
        raise _wrong(path, f"have the fields {', '.join(names)} alone", unknown[0])
    hints = _hints_of(kind)
    return kind(**{name: _read(hints[name], data[name], f"{path}.{name}") for name in names})


def _read_optional(kind: Any, data: Any, path: str) -> Any:
    """A union is of one type and None."""
    if data is None:
        return None
    return _read(next(part for part in get_args(kind) if part is not types.NoneType), data, path)


def _read_tuple(kinds: tuple[Any, ...], data: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(data, (list, tuple)):
        raise _wrong(path, "be a list", data)
    if kinds[1:] == (Ellipsis,):
        kinds = kinds[:1] * len(data)
    if len(data) != len(kinds):
        raise _wrong(path, f"have {len(kinds)} entries", data)
    pairs = zip(kinds, data, strict=True)
    return tuple(_read(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(pairs))


def _read_choice(values: Any, data: Any, path: str) -> Any:
    if data not in values:
        raise _wrong(path, f"be one of {', '.join(map(repr, values))}", data)
    return data


def _read_simple(kind: Any, data: Any, path: str, bounds: Within | None) -> Any:
    if kind is float and type(data) is int:
        data = float(data)
    if type(data) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise _wrong(path, f"be {words[kind]}", data)
    if kind is float and not math.isfinite(data):
        raise _wrong(path, "be finite", data)
    if bounds is not None and not bounds.least <= data <= bounds.most:
        raise _wrong(path, f"be between {bounds.least:g} and {bounds.most:g}", data)
    return data


def _wrong(path: str, rule: str, data: Any) -> CheckpointError:
    text = data if isinstance(data, str) else repr(data)
    text = text if len(text) <= 80 else text[:77] + "..."
    return CheckpointError(f"{path} must {rule}, got {text}. {_FIX}")
