"""Faults of a block as sentences: full path, rule, value, fix. Survives any value."""

from __future__ import annotations

import difflib
import itertools
import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from ds_gradprune.config.fields import inner_model

_LONGEST = 80
"""Characters of a value in a message."""

_BOUNDS = {
    "greater_than": ("be greater than", "gt"),
    "greater_than_equal": ("be at least", "ge"),
    "less_than_equal": ("be at most", "le"),
    "string_too_long": ("have at most so many characters:", "max_length"),
    "too_long": ("have at most so many entries:", "max_length"),
}
_RULES = {
    "string_too_short": "not be empty",
    "string_pattern_mismatch": "not hold a null character",
    "too_short": "have at least 1 entry",
}
_KINDS = {
    "int": "be a whole number",
    "float": "be a number",
    "finite": "be a finite number",
    "string": "be a string",
    "list": "be a list",
    "model": "be a JSON object",
}
"""First word of a pydantic error's type -> the rule."""


def sentence(error: Mapping[str, Any], root: type[BaseModel], block: str) -> str:
    """One error of pydantic as one sentence.

    Args:
        error: an entry of `ValidationError.errors()`.
        root: the model that was validated.
        block: the name of the block that it reads.
    """
    location, value = error["loc"], error["input"]
    path, name = path_of(block, location), str(location[-1]) if location else ""
    model = _model_at(root, location[:-1])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0.6)
        known = ", ".join(sorted(model.model_fields))
        hint = f'Did you mean "{near[0]}"?' if near else f"Known keys: {known}."
        return f"{path} is not a known key. {hint}"
    if error["type"] == "missing":
        return f"{path} must be given. {model.model_fields[name].description}"
    return f"{path} must {_rule(error)}, got {shown(value)}."


def path_of(block: str, location: Sequence[int | str]) -> str:
    """A place inside the block, such as gradient_pruning.throttle.schedule[0].step."""
    path = block
    for part in location:
        is_plain = isinstance(part, str) and part.isidentifier() and len(part) <= _LONGEST
        path += f".{part}" if is_plain else f"[{shown(part)}]"
    return path


def name_of(key: Any) -> str:
    """A key as text that can be printed and looked up."""
    text = key if isinstance(key, str) else shown(key)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: Any) -> str:
    """A value as the user wrote it, cut to one line's length."""
    text = _text(value, depth=4).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _text(value: Any, depth: int) -> str:
    """JSON where that can be written; never deeper than `depth`, never a number of many lines."""
    if isinstance(value, str):
        return json.dumps(value[: _LONGEST + 1], ensure_ascii=False)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, Mapping):
        members = itertools.islice(value.items(), _LONGEST)
        inner = (f"{_text(key, 0)}: {_text(item, depth - 1)}" for key, item in members)
        return "{...}" if depth <= 0 and value else "{" + ", ".join(inner) + "}"
    if isinstance(value, (list, tuple)):
        inner = (_text(item, depth - 1) for item in itertools.islice(value, _LONGEST))
        return "[...]" if depth <= 0 and value else "[" + ", ".join(inner) + "]"
    return reprlib.repr(value)


def _model_at(root: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    """The model that holds the field at a path such as ("throttle", "schedule", 0)."""
    model = root
    for part in location:
        if isinstance(part, str):
            model = inner_model(model.model_fields[part].annotation) or model
    return model


def _rule(error: Mapping[str, Any]) -> str:
    kind, context = str(error["type"]), error.get("ctx", {})
    if kind == "wrong_type":
        return f"be {context['words']}"
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        bound = context[key]
        return f"{words} {bound if isinstance(bound, int) else format(bound, 'g')}"
    if kind in _RULES:
        return _RULES[kind]
    if kind == "literal_error":
        return "be " + str(context["expected"]).replace("'", '"').replace("False", "false")
    for first, rule in _KINDS.items():
        if kind.startswith(first):
            return rule
    message = str(error["msg"])
    return f"be right ({message[:1].lower()}{message[1:]})"
