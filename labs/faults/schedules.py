"""Schedules of faults, drawn from a seed: the same seed and number give the same schedule."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from ds_gradprune.config import GradientPruningConfig

LIVES = 4
"""A schedule that resumes is started so often at most, the first time included. The last life has
no fault."""


@dataclass(frozen=True)
class Event:
    """A fault of one rank.

    Attributes:
        kind: see `KINDS`.
        life: start of the run that it happens in, from 0.
        rank: whose.
        step: the optimizer step under way, counted from 1.
        call: number of the rank's transport call inside the step, for kinds that hit a call.
    """

    kind: str
    life: int
    rank: int
    step: int
    call: int


KINDS = {
    "raise": "an error of its own in the computation",
    "kill": "gone inside a call of the transport, which may be half done",
    "stop": "frozen for ever inside a call",
    "delay": "late by less than the time-out",
    "corrupt sent": "one bit of what it sends is flipped, for all",
    "corrupt received": "one bit of what it receives is flipped, for itself",
    "nan": "an element of its weights, or of its gradient, is nan",
    "behind": "it counts one step less than the others",
    "foreign": "its shared weights, or its replica, differ in one bit",
    "full disk": "its file cannot be written, the disk is full",
    "flip": "one bit of the newest checkpoint's file flips before the run resumes",
}
"""What may happen, in words."""


@dataclass(frozen=True)
class Schedule:
    """One run on loopback.

    Attributes:
        seed: of everything that is drawn while it runs.
        config: the product's block.
        ranks: islands, or ranks with pruned gradients.
        steps: optimizer steps.
        save_every: steps between checkpoints.
        hides: an exchange is applied one step after it was begun; update mode only.
        resumes: after a fault the run goes on from its last whole checkpoint.
        events: what happens.
    """

    seed: int
    config: GradientPruningConfig
    ranks: int
    steps: int
    save_every: int
    hides: bool
    resumes: bool
    events: tuple[Event, ...]


def draw(seed: int, number: int) -> Schedule:
    """Schedule `number` of a seed."""
    chance = random.Random(f"{seed}/{number}")
    ranks, steps = chance.randint(2, 5), chance.randint(6, 16)
    mode = chance.choice(["update", "update", "gradient"])
    lives = range(chance.choice([1, 1, 2, LIVES - 1]))
    events = [
        Event(
            chance.choice(list(KINDS)),
            life,
            chance.randrange(ranks),
            chance.randint(1, steps),
            chance.randrange(3),
        )
        for life in lives
        for _ in range(chance.choice([0, 1, 1, 1, 2]))
    ]
    config = GradientPruningConfig.model_validate(_block(chance, mode))
    return Schedule(
        seed=chance.randrange(2**31),
        config=config,
        ranks=ranks,
        steps=steps,
        save_every=chance.randint(2, 5),
        hides=mode == "update" and chance.random() < 0.3,
        resumes=chance.random() < 0.7,
        events=tuple(events),
    )


def _block(chance: random.Random, mode: str) -> dict[str, Any]:
    density = chance.choice([0.01, 0.05, 0.2])
    law = {} if chance.random() < 0.3 else {"initial": density, "min": density, "max": density}
    block: dict[str, Any] = {
        "prune": mode,
        "warmup_steps": chance.choice([0, 2]),
        "ramp_steps": 0,
        "window_size": 4,
        "value_bits": chance.choice([2, 4, 16, 32]),
        "exchange": chance.choice(["all_gather", "owner_reduce"]),
        "density": law,
        "verify_every_steps": chance.choice([1, 3]),
    }
    if mode == "update":
        block |= {
            "warmup": "unpruned",
            "sync_every": chance.choice([1, 1, 3]),
            "residual": chance.choice(["used", "reset"]),
            "residual_decay": 1.0,  # what decays is meant to be lost
            "slow_momentum": chance.choice([0.0, 0.0, 0.5]),
        }
    return block
