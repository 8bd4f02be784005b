"""What made exchanges slower or faster: the network, or busy hosts. Words for a user. Pure.

A host whose cores do something else computes for longer, and its exchanges take longer as well,
because they wait for the same cores. So an exchange says something about the network only where it
took longer, for as many bytes, than the computation beside it explains.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_gradprune.law.stats import Change, Samples, median

BUSY = 1.25
"""Computation that takes so many times as long tells of busy hosts."""

BEFORE, NOW = 20, 3
"""Exchanges that are compared: so many before the newest so many."""

NOTABLE = 1.1
"""Exchanges that changed by less are not worth a word."""

NOISE = 1.35
"""An exchange explains itself up to so many times what is expected: three sigma of 10 % noise."""

SLICES_S = 0.03
"""A thread of an exchange that wakes up on a busy core waits there for a slice of time, 3 to 4 ms
on Linux, and an exchange wakes up about eight times."""


def busier(computes_s: Sequence[float]) -> float | None:
    """How many times as long the newest computations take as those before; None: unknown.

    Args:
        computes_s: seconds per step of one exchange after the other, oldest first.
    """
    now, before = computes_s[-NOW:], computes_s[:-NOW][-BEFORE:]
    if not before:
        return None
    return median(list(now)) / median(list(before))


def slower(before: Samples, now: Samples, computing: float = 1.0) -> float | None:
    """How many times as long exchanges take as before, for as many bytes; None: unknown.

    Args:
        before: (bytes, seconds) of exchanges before the change.
        now: the same since.
        computing: what `busier` says; it counts as an explanation, and what it explains is left
            out.
    """
    if not before or not now:
        return None
    return median([_factor(before, size, time_s, computing) for size, time_s in now])


def _factor(before: Samples, size: int, time_s: float, computing: float) -> float:
    """One exchange over what it was expected to take; 1.0 where it is inside that range.

    Other sizes say only what it may have been: as long as they took, if all of that was latency, or
    in proportion to the bytes.
    """
    alike = [sample for sample in before if sample[0] / NOISE <= size <= sample[0] * NOISE]
    pairs = [(seen_s, seen_s * size / seen) for seen, seen_s in alike or before]
    least_s = median([min(pair) for pair in pairs])
    most_s = median([max(pair) for pair in pairs])
    if computing >= BUSY:
        most_s = computing * most_s + SLICES_S
    elif computing <= 1.0 / BUSY:
        least_s = computing * max(0.0, least_s - SLICES_S)
    return time_s / min(max(time_s, least_s), most_s)


def busy_words(computes_s: Sequence[float]) -> str:
    """That computation takes longer; empty: it does not."""
    computing = busier(computes_s)
    if computing is None or computing < BUSY:
        return ""
    return f"computation takes {computing:.1f} times as long: the hosts are busy"


def words(
    change: Change | None, computes_s: Sequence[float], former: Samples, now: Samples, rate: str
) -> str:
    """What to tell of exchanges that changed; empty: too little to be worth a word.

    Args:
        change: which way; None: they have not.
        computes_s: see `busier`.
        former: (bytes, seconds) of the exchanges up to the one before the newest.
        now: those since the change, the newest included.
        rate: of the link now, for a user, with what sets it apart; empty: unknown.
    """
    if change is None:
        return ""
    before = former[: max(0, len(former) + 1 - len(now))]
    computing = busier(computes_s) or 1.0
    plain, left = slower(before, now), slower(before, now, computing)
    if plain is not None and 1.0 / NOTABLE < plain < NOTABLE:
        return busy_words(computes_s)
    is_explained = left is not None and 1.0 / NOISE < left < NOISE
    text = f"exchanges became {change}{rate}"
    if change == "slower" and computing >= BUSY:
        longer = f"computation takes {computing:.1f} times as long"
        if is_explained:
            return f"{longer}, and so do exchanges: the hosts are busy"
        return f"{text}, and {longer}"
    if change == "faster" and computing <= 1.0 / BUSY and is_explained:
        return "computation and exchanges became faster: the hosts are less busy"
    return text


def told(reason: str, said: str, *, leads: bool = False) -> str:
    """A decision's reason with what is said of the exchanges, which may be nothing.

    Args:
        reason: of the decision.
        said: see `words`.
        leads: it is why something was decided.
    """
    if not said:
        return reason
    return f"{said}: {reason}" if leads else f"{reason}; {said}"
