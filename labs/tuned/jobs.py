"""What is compared, in which order: dense training at three learning rates, and islands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from labs.convergence.grid import Dense, Method, Update

ISLANDS = 2
LEARNING_RATES = {"full": 7e-5, "lora": 5e-4}
"""Of dense training; jobs multiply it."""


def _rounds(name: str, every: int, **more: Any) -> Update:
    """Rounds as the product has them by default up to 3.1 %: the mean update counts N times."""
    keys: dict[str, Any] = {
        "sync_every": every,
        "density": 0.03125,
        "value_bits": 2,
        "residual": "reset",
        "update_scale": float(ISLANDS),
    }
    return Update(kind="update", name=name, **(keys | more))


METHODS: dict[str, Method] = {
    "dense": Dense(kind="dense", name="dense"),
    "every 10": _rounds("every 10", 10),
    "every 5": _rounds("every 5", 5),
    "every 5, 4 bits": _rounds("every 5, 4 bits", 5, value_bits=4),
    "every 5, 6.3 %": _rounds("every 5, 6.3 %", 5, density=0.0625),
    "every step": Update(kind="update", name="every step", density=0.01, value_bits=4),
    "every step, 5 %": Update(kind="update", name="every step, 5 %", density=0.05, value_bits=4),
    "every 10, hidden": _rounds("every 10, hidden", 10, overlap="auto"),
}


@dataclass(frozen=True)
class Job:
    """Runs that are made side by side.

    Attributes:
        kind: "full" or "lora".
        methods: keys of METHODS; all dense, or none.
        seeds: so many runs of each.
        factors: of the learning rate, one group of runs each.
    """

    kind: str
    methods: tuple[str, ...]
    seeds: int = 4
    factors: tuple[float, ...] = (1.0,)


JOBS = (
    Job("full", ("dense",)),
    Job("full", ("every 10",)),
    Job("lora", ("dense",)),
    Job("full", ("every 5",)),
    Job("lora", ("every 10",)),
    Job("lora", ("every 5",)),
    Job("full", ("dense",), 2, (0.5, 2.0)),
    Job("lora", ("dense",), 2, (0.5, 2.0)),
    Job("full", ("every step",)),
    Job("lora", ("every step",)),
    Job("full", ("every 10, hidden",)),
)
"""The most telling first: time may end. Eight rows of 135M and 1,024 tokens take 95 GB."""
