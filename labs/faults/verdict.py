"""What became of a run on loopback: did ranks disagree, was anything lost?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ds_gradprune.train.crc import crc_of
from labs.faults.rank import Rank
from labs.faults.schedules import Schedule


@dataclass
class Life:
    """How one start of a run ended.

    Attributes:
        ends: of every rank: "done", "typed", "gone", "untyped" or "hung".
        told: of every rank: what it said at its end.
        crcs: of every rank: (step, hash of what must be equal).
        ranks: the ranks that are done.
    """

    ends: list[str]
    told: list[str]
    crcs: list[dict[int, int]]
    ranks: list[Rank | None] = field(default_factory=list)


@dataclass
class Verdict:
    """How a schedule ended.

    Attributes:
        end: "finished", "typed_error", "hung" or "untyped".
        diverged: ranks disagree, or a resumed run ended with other bits than an unbroken one.
        lost_gradient: what was put in is not what came out and what is still owed.
        lives: starts of the run.
        notes: what every life ended with, for people.
    """

    end: str
    diverged: bool = False
    lost_gradient: bool = False
    lives: int = 0
    notes: list[str] = field(default_factory=list)


def judge(schedule: Schedule, life: Life, verdict: Verdict, unbroken: Callable[[], Life]) -> None:
    """Conservation over the whole run, and the bits of an unbroken one."""
    ranks = [rank for rank in life.ranks if rank is not None]
    if any(event.kind == "foreign" for event in schedule.events):
        return  # a flipped bit of the weights is no gradient
    balances = [rank.balance() for rank in ranks]
    put_in = torch.stack([balance[0] for balance in balances]).sum(0)
    bound = sum(balance[2] for balance in balances)
    off = float((put_in - balances[0][1]).abs().max())
    if not off <= bound:
        verdict.lost_gradient = True
        verdict.notes.append(f"off by {off:.3g}, rounding explains {bound:.3g}")
    if verdict.lives > 1 and _is_repeatable(schedule):
        plain = unbroken().ranks[0]
        assert plain is not None
        if crc_of(plain.agreed()) != crc_of(ranks[0].agreed()):
            verdict.diverged = True
            verdict.notes.append("other bits than the unbroken run")


def _is_repeatable(schedule: Schedule) -> bool:
    """Measured times decide nothing, and every fault ended its life or changed nothing.

    A nan in a gradient costs that step's gradient, on all ranks alike, and is no fault of the run.
    """
    density = schedule.config.density
    poisons = schedule.config.prune == "gradient"
    is_poisoned = poisons and any(event.kind == "nan" for event in schedule.events)
    return density.min == density.max and not is_poisoned


def disagree(life: Life, schedule: Schedule) -> bool:
    """Ranks had other bits after the same step, and did not find it."""
    if any(event.kind == "foreign" for event in schedule.events):
        # One rank was made to differ. Whether it was found is all that counts.
        last = [max(crcs.items(), default=(0, 0)) for crcs in life.crcs]
        return "done" in life.ends and len(set(last)) > 1 and _had_time(life, schedule)
    steps = {step for crcs in life.crcs for step in crcs}
    return any(len({crcs[step] for crcs in life.crcs if step in crcs}) > 1 for step in steps)


def _had_time(life: Life, schedule: Schedule) -> bool:
    """Two verifications have passed between the flipped bit and the end of the run."""
    every = schedule.config.verify_every_steps or 1
    sync_every = schedule.config.sync_every if schedule.config.prune == "update" else 1
    window = 2 * max(every, sync_every) + 2 * sync_every
    return any(
        event.kind == "foreign" and event.step <= schedule.steps - window
        for event in schedule.events
    )
