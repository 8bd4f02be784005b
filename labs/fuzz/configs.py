"""A full `gradient_pruning` block, and a file that holds it, with something changed."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import hjson

from ds_gradprune.config import BLOCK, load_block, read_config
from ds_gradprune.train.loop import Loop
from ds_gradprune.train.outer import make_rule, update_scale

FULL: dict[str, Any] = {
    "enabled": True,
    "prune": "update",
    "island": {"ranks": 2},
    "sync_every": 4,
    "residual": "reset",
    "residual_decay": 0.9,
    "update_scale": 1.5,
    "slow_momentum": 0.5,
    "warmup": "unpruned",
    "warmup_steps": 10,
    "ramp_steps": 5,
    "window_size": 16,
    "performance_target": 0.1,
    "performance_target_schedule": [{"step": 1, "target": 0.2}, {"step": 9, "target": 0.0}],
    "performance_form": "literal",
    "step_time_budget_s": 0.5,
    "controller": "stepwise",
    "density": {"initial": 0.05, "min": 0.01, "max": 0.2},
    "value_bits": 2,
    "error_feedback": True,
    "min_numel": 100,
    "exchange": "owner_reduce",
    "overlap": "auto",
    "shared_device": "cpu",
    "transport": "mpi",
    "timeout_s": 60.0,
    "verify_every_steps": 10,
    "log_path": "log.jsonl",
    "throttle": {"schedule": [{"rate_mbit": 20.0}, {"step": 9, "rate_mbit": 5.0, "outage_s": 1.0}]},
}


def deep(levels: int) -> Any:
    """A value inside so many lists or objects."""
    value: Any = 1
    for _ in range(levels):
        value = [value] if levels % 2 else {"schedule": value}
    return value


class Odd:
    """A value that cannot even be printed."""

    def __repr__(self) -> str:
        """Refuse."""
        raise RuntimeError("no")


NONSENSE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"),
    float("-inf"), 10**30, -(10**30), 10**5000, "", "auto", "null", "3", "true", "1e999", "a\0b",
    "\ud800", "x" * 100_000, [], [[]], {}, {"": 1}, {1: 2}, {"step": 1}, [{"step": -1}],
    [1, 2, 3], [None], (1,), {"ranks": {"ranks": 1}}, deep(101), deep(100_000), deep(99_999),
    b"bytes", Odd(), object, {"schedule": [{"rate_mbit": 1}] * 20_000},
)  # fmt: skip


def places(value: Any, at: tuple[int | str, ...] = ()) -> list[tuple[int | str, ...]]:
    """Every place inside a block."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = [at] if at else []
    for key, item in items:
        here = (*at, key)
        found += places(item, here) if isinstance(item, (dict, list)) else [here]
    return found


def path_of(place: tuple[int | str, ...]) -> str:
    """The place as messages write it."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    return BLOCK + "".join(parts)


def mutated(rng: random.Random) -> tuple[Any, tuple[int | str, ...]]:
    """A full block with one thing changed, and the place of the change."""
    block = copy.deepcopy(FULL)
    place = rng.choice(places(block))
    holder: Any = block
    for part in place[:-1]:
        holder = holder[part]
    kind = rng.choice(("value", "value", "value", "remove", "rename", "wrap", "swap"))
    if kind == "value":
        holder[place[-1]] = rng.choice(NONSENSE)
    elif kind == "remove":
        del holder[place[-1]]
    elif kind == "rename" and isinstance(holder, dict):
        name = rng.choice(("", "x\n", "\ud800", "k" * 5000, str(place[-1]) + "_", "ranks"))
        holder[name] = holder.pop(place[-1])
        place = (*place[:-1], name)
    elif kind == "wrap":
        holder[place[-1]] = rng.choice(([holder[place[-1]]], {"value": holder[place[-1]]}))
    else:
        holder[place[-1]] = copy.deepcopy(rng.choice([*FULL.values()]))
    return block, place


def mutated_text(rng: random.Random) -> str:
    """A whole file with one thing changed; it may still be right."""
    text = json.dumps({"train_batch_size": 8, BLOCK: FULL}, indent=1)
    at = rng.randrange(len(text))
    kind = rng.choice(("cut", "drop", "insert", "replace", "number", "nest", "twice"))
    inserted = rng.choice(
        ("{", "}", "[", "]", ",", ":", '"', "/*", "//", "\\", "1e999", "-1e999", "NaN", "\0", "é")
    )
    if kind == "cut":
        return text[:at]
    if kind == "drop":
        return text[:at] + text[at + rng.randint(1, 5) :]
    if kind == "insert":
        return text[:at] + inserted + text[at:]
    if kind == "replace":
        return text[:at] + inserted + text[at + 1 :]
    if kind == "number":
        number = rng.choice(("1e999", "-1e999", "NaN", "Infinity", "9" * 6000, "1e-999", "0x10"))
        return text.replace("60.0", number)
    if kind == "nest":
        return text.replace("60.0", "[" * 100_000 + "]" * rng.choice((0, 100_000)))
    line = rng.choice([line for line in text.splitlines() if line.rstrip(",")[-1:] not in "[]{}"])
    return text.replace(line, line.rstrip(",") + "," + line, 1)


def attempt(rng: random.Random, path: Any) -> None:
    """One mutated configuration on the way of a start; what is accepted must be usable.

    Args:
        rng: decides what.
        path: of a file that is overwritten.

    Raises:
        ConfigError: it was refused, as most are.
    """
    if rng.random() < 0.5:
        ds_config: Any = {BLOCK: mutated(rng)[0]}
    else:
        path.write_text(mutated_text(rng), encoding="utf-8")
        ds_config = read_config(str(path), hjson.loads)
    config = load_block(ds_config, total_steps=rng.choice((None, 1, 50, 10**9)))
    Loop(config, lambda: 0.0)
    make_rule(config.slow_momentum, config.sync_every)
    update_scale(2, config.update_scale)
