"""The table of the `gradient_pruning` block, made from the models that check it.

python docs/config_table.py            prints the table
python docs/config_table.py --write    puts it between the markers in docs/configuration.md
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

if __name__ == "__main__":
    # The root instead of this folder, whose files are scripts and no modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.marked_table import MarkedTable, run
from ds_gradprune.config import GradientPruningConfig


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The model, then the models inside it, depth first.

    Args:
        model: the outermost model.
        prefix: path of the model inside the block, with its last dot.

    Yields:
        Prefix of the keys, and the model that holds them.
    """
    yield prefix, model
    for name, field in model.model_fields.items():
        for inner, is_list in _models_in(field.annotation):
            yield from sections(inner, f"{prefix}{name}{'[]' if is_list else ''}.")


def table() -> str:
    """Markdown, one row per key, in the order of the models."""
    rows = ["| key | default | accepts | meaning |", "|---|---|---|---|"]
    for prefix, model in sections(GradientPruningConfig):
        for name, field in model.model_fields.items():
            cells = (f"`{prefix}{name}`", _default(field), _accepts(field), field.description)
            rows.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(rows)


def _models_in(annotation: Any, is_list: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """Every model in an annotation, and whether a list holds it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, is_list
    for member in get_args(annotation):
        yield from _models_in(member, is_list or get_origin(annotation) is list)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    if field.default_factory is not None:
        return "see below"
    return f"`{json.dumps(field.default)}`"


def _accepts(field: FieldInfo) -> str:
    bounds = [text for item in field.metadata if (text := _bound(item))]
    kinds = _kinds(field.annotation)
    if kinds[0].startswith("`") or not bounds:
        return " or ".join(kinds)
    return " or ".join([f"{kinds[0]} {', '.join(bounds)}", *kinds[1:]])


def _kinds(annotation: Any) -> list[str]:
    """What a field accepts, `null` last."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        found = [m for item in metadata for m in getattr(item, "metadata", [item])]
        bounds = ", ".join(text for item in found if (text := _bound(item)))
        return [f"{kind} {bounds}".strip() for kind in _kinds(inner)]
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for member in get_args(annotation) for kind in _kinds(member)]
    if get_origin(annotation) is Literal:
        return [f"`{json.dumps(value)}`" for value in get_args(annotation)]
    if annotation is types.NoneType:
        return ["`null`"]
    names = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text"}
    return [names.get(annotation, "list" if get_origin(annotation) is list else "object")]


def _bound(item: Any) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = {sign: getattr(item, name) for name, sign in signs.items() if hasattr(item, name)}
    return ", ".join(f"{sign} {_number(bound)}" for sign, bound in bounds.items())


def _number(bound: float) -> str:
    return f"{bound:,.0f}" if bound == int(bound) else f"{bound:g}"


TABLES = (MarkedTable("docs/configuration.md", "config table", "docs/config_table.py", table),)

if __name__ == "__main__":
    run(TABLES, sys.argv[1:])
