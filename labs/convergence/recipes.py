"""Which rows of a case are what the product does by default, and what stands beside them."""

from __future__ import annotations

import math
from typing import Any, Literal

from ds_gradprune.train.scale import scale_at, sparse_scale
from labs.convergence.plot import frontier

RECIPES = {(1, 0.01, 4): "every step", (5, 1 / 32, 2): "every 5", (10, 1 / 32, 2): "every 10"}
"""What the documents recommend, as (sync_every, density, value_bits)."""

_OTHER_KEYS = {"slow", "slow_momentum", "local_lr", "residual_decay", "overlap", "pick"}
"""Settings that make a method another form than the default."""


def recipe(row: dict[str, Any], workers: int) -> str | None:
    """Which of the product's recipes a row is; None: another form."""
    own = row["settings"]
    if row["kind"] != "update" or _OTHER_KEYS & own.keys():
        return None
    interval, density = own.get("sync_every", 1), own.get("density", 0.01)
    root = math.sqrt(workers)
    residual: Literal["used", "reset"] = "used" if interval == 1 else "reset"
    if own.get("residual", residual) != residual:
        return None
    sparse = sparse_scale(None, residual)
    scale = own.get("update_scale", own.get("scale", root))
    if not math.isclose(scale, scale_at(density, root, sparse, workers)):
        return None
    return RECIPES.get((interval, density, own.get("value_bits", 4)))


def defaults(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The product's recipes, one row of each, most bits first."""
    first: dict[str, dict[str, Any]] = {}
    for row in case["rows"]:
        name = recipe(row, case["workers"])
        if name is not None:
            first.setdefault(name, row | {"recipe": name})
    return sorted(first.values(), key=lambda row: -row["bits_per_param"])


def others(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Forms of update mode beside the recipes that no other form beats, most bits first."""
    best = frontier([row for row in case["rows"] if row["kind"] == "update"])
    return [row for row in best if recipe(row, case["workers"]) is None]


def peers(case: dict[str, Any]) -> list[dict[str, Any]]:
    """All other methods."""
    return [row for row in case["rows"] if row["kind"] != "update"]
