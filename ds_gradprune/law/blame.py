"""What made exchanges slower or faster: the network, or busy hosts. Words for a user. Pure.

A host whose cores do something else computes for longer, and its exchanges take longer as well,
because they wait for the same cores. So an exchange says something about the network only where it
took longer, for as many bytes, than the computation beside it explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ds_gradprune.law.stats import Change, Samples, median

BUSY = 1.25
"""Computation that takes so many times as long as on calm hosts tells of busy ones."""

NOW, LEAST = 3, 5
"""So many exchanges are what is compared, and so many computations are needed."""

FORGET = 1.002
"""Where computation stays longer, the calm one follows by so much per exchange: in 350 it doubles,
since hosts that are always busy are slow ones."""

NOTABLE, JITTER_S = 1.1, 0.01
"""An exchange that changed by less is not worth a word. Threads that wake up late make it up to 10
ms longer on calm hosts (measured: 0.2 to 8 ms over a loopback)."""

NOISE = 1.35
"""An exchange explains itself up to so many times what is expected: three sigma of 10 % noise."""

SLICES_S = 0.03
"""A thread of an exchange that wakes up on a busy core waits there for a slice of time, 3 to 4 ms
on Linux, and an exchange wakes up about eight times."""


class Span(NamedTuple):
    """What an exchange may take, seconds."""

    least_s: float
    most_s: float

    def holds(self, time_s: float, factor: float, more_s: float = 0.0) -> bool:
        """Whether a time is in it, or so many times and so many seconds beside it."""
        least_s = (self.least_s - more_s) / factor
        return least_s < time_s < factor * self.most_s + more_s


def calmer(calm_s: float | None, ordered_s: Sequence[float]) -> float | None:
    """What a computation takes while hosts are calm, after one more exchange; None: unknown.

    Args:
        calm_s: before it.
        ordered_s: computation per step of the last exchanges, in rising order.
    """
    if len(ordered_s) < LEAST:
        return calm_s
    quarter_s = ordered_s[len(ordered_s) // 4]
    return quarter_s if calm_s is None else min(FORGET * calm_s, quarter_s)


def busier(computes_s: Sequence[float], calm_s: float | None) -> float:
    """How many times as long the newest computations take as calm ones; 1.0 where unknown."""
    if calm_s is None or not computes_s:
        return 1.0
    return median(list(computes_s[-NOW:])) / calm_s


def busy_words(computes_s: Sequence[float], calm_s: float | None) -> str:
    """That computation takes longer; empty: it does not."""
    computing = busier(computes_s, calm_s)
    if computing < BUSY:
        return ""
    return f"computation takes {computing:.1f} times as long: the hosts are busy"


def words(
    change: Change | None,
    computes_s: Sequence[float],
    calm_s: float | None,
    former: Samples,
    now: Samples,
    rate: str,
) -> str:
    """What to tell of exchanges that changed; empty: too little to be worth a word.

    Args:
        change: which way; None: they have not.
        computes_s: seconds per step of the last exchanges, the newest last.
        calm_s: see there.
        former: (bytes, seconds) of the exchanges up to the one before the newest.
        now: those since the change, the newest included.
        rate: of the link now, for a user, with what sets it apart; empty: unknown.
    """
    if change is None:
        return ""
    before = former[: max(0, len(former) + 1 - len(now))]
    computing, was = busier(computes_s, calm_s), busier(computes_s[:-NOW], calm_s)
    text = f"exchanges became {change}{rate}"
    if before and now:
        time_s, span = _typical(before, now)
        if span.holds(time_s, NOTABLE) or span.holds(time_s, 1.0, JITTER_S):
            return busy_words(computes_s, calm_s)
        busiest = max(computing, was)
        if busiest >= BUSY and span.holds(time_s, NOISE * busiest, SLICES_S):
            return _explained(change, computing, was)
    if change == "slower" and computing >= BUSY:
        return f"{text}, and computation takes {computing:.1f} times as long"
    return text


def _explained(change: Change, computing: float, was: float) -> str:
    """Exchanges that changed as the hosts' business did."""
    if computing >= BUSY:
        also = ", and so do exchanges" if change == "slower" else ""
        return f"computation takes {computing:.1f} times as long{also}: the hosts are busy"
    faster = change == "faster" and was >= BUSY
    return "computation and exchanges became faster: the hosts are less busy" if faster else ""


def _typical(before: Samples, now: Samples) -> tuple[float, Span]:
    """The exchange in the middle of the newest ones, by what was expected of it."""
    newest = now[-NOW:]
    spans = [_expected(before, size) for size, _ in newest]
    seen = [
        (time_s / min(max(time_s, span.least_s), span.most_s), time_s, span)
        for (_, time_s), span in zip(newest, spans, strict=True)
    ]
    return sorted(seen)[len(seen) // 2][1:]


def _expected(before: Samples, size: int) -> Span:
    """What exchanges of a size would have taken.

    Other sizes say only what it may have been: as long as they took, if all of that was latency, or
    in proportion to the bytes.
    """
    alike = [sample for sample in before if sample[0] / NOISE <= size <= sample[0] * NOISE]
    pairs = [(seen_s, seen_s * size / seen) for seen, seen_s in alike or before]
    return Span(median([min(pair) for pair in pairs]), median([max(pair) for pair in pairs]))


def told(reason: str, said: str) -> str:
    """A decision's reason, and what is said of the exchanges, which may be nothing."""
    return f"{reason}; {said}" if said else reason
