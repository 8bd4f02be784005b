"""What a run decided, where, and why, in words for a user. Pure."""

from __future__ import annotations

import statistics

from ds_gradprune.commands.runlog import Run, mbit
from ds_gradprune.law import blame

LOOKED_BACK = 24
"""Exchanges that a decision is compared with."""


def decisions(run: Run) -> list[int]:
    """Indices of the exchanges after which something was decided, in order.

    The first and the last exchange, the ends of warm-up and ramp, where the warm-up goes on
    unpruned, and every move of the density or the interval in between. Steps of the ramp itself are
    none.
    """
    found = {0, len(run.entries) - 1}
    for number, entry in enumerate(run.entries):
        after = run.entries[number + 1 : number + 2]
        if (entry.has_changed and _exchange_changed(run, number)) or (
            entry.is_move and entry.next_cause != "ramp"
        ):
            found.add(number)
        if entry.next_cause != entry.cause and "warmup" in (entry.cause, entry.next_cause):
            found.add(number)
        if entry.cause == "ramp" and entry.next_cause != "ramp":
            found.add(number)
        if entry.next_unpruned and not run.entries[number - 1].next_unpruned:
            found.add(number)
        if after and after[0].interval != entry.interval and after[0].cause != "warmup":
            found.add(number + 1)
    return sorted(found)


def why(run: Run, number: int) -> str:
    """What the decision after an exchange was for, in words that blame nothing without a reason."""
    entry = run.entries[number]
    cause = entry.next_cause
    if entry.cause == "ramp" and cause == "hold":
        return "ramp ends"
    if cause == "over_budget":
        return _over_budget(run, number)
    changed = ""
    if entry.has_changed or cause == "network_changed":
        changed = _exchange_changed(run, number)
    if changed:
        return changed
    if cause == "budget_room":
        return "room in the budget" if run.budget_s is not None else "more can be sent"
    return {
        "warmup": "unpruned warm-up" if entry.next_unpruned else "dense warm-up",
        "ramp": "ramp begins" if entry.cause != "ramp" else "ramp",
        "performance_missed": "P misses its target: sends more",
        "dense_cheaper": "dense is faster",
        "network_changed": "what a step costs has changed",
        "hold": "hold",
    }.get(cause, cause.replace("_", " "))


def _over_budget(run: Run, number: int) -> str:
    budget = None if run.budget_s is None else f"over the budget of {run.budget_s:g} s a step"
    if run.entries[number].has_changed:
        changed = _exchange_changed(run, number)
    else:
        changed = blame.busy_words(*_computes(run, number))
    if not changed:
        return budget or "a step takes longer than it pays: sends less"
    return changed if budget is None else f"{budget}, {changed}"


def _exchange_changed(run: Run, number: int) -> str:
    """What to tell of exchanges that changed; empty: too little."""
    entry = run.entries[number]
    told = [e.told_exchange for e in run.entries[max(0, number + 1 - LOOKED_BACK) : number + 1]]
    samples = tuple(sample for sample in told if sample is not None)
    rate = "" if entry.link_mbit is None else f": {mbit(entry.link_mbit)} Mbit/s"
    return blame.words(
        "slower" if _is_slower(run, number) else "faster",
        *_computes(run, number),
        samples[:-1],
        samples[-blame.NOW :],
        rate,
    )


def _is_slower(run: Run, number: int) -> bool:
    """Which way the exchanges changed: by their rate, or else by what was decided."""
    entry = run.entries[number]
    before = run.entries[max(0, number - blame.NOW) : number]
    rates = [e.link_mbit for e in before if e.link_mbit is not None]
    if rates and entry.link_mbit is not None and entry.link_mbit != statistics.median(rates):
        return entry.link_mbit < statistics.median(rates)
    return entry.density is None or (entry.next_density or 0.0) < entry.density


def _computes(run: Run, number: int) -> tuple[list[float], float | None]:
    """Computations up to a decision, and what they take while hosts are calm."""
    known_s = [e.told_compute_s for e in run.entries[: number + 1] if e.told_compute_s]
    return known_s, sorted(known_s)[len(known_s) // 10] if len(known_s) >= blame.LEAST else None
