"""What the codec takes: a straight line in the number of kept elements."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.law.decision import KeptElements
from ds_gradprune.law.stats import Count, Seconds, Within, clamp, is_time, median

WINDOW_STEPS = 5
"""Codec times behind their median."""

_SAME, _APART, _FAR = 1.1, 1.25, 2.0
"""Factors between two numbers of kept elements: about the same; apart enough for a line; far."""

CodecTime = Annotated[float, Within(0.0, 1e9)]


class CodecTimes(NamedTuple):
    """What the codec took.

    Attributes:
        k: kept elements per chunk that `times_s` are about; 0: none yet.
        times_s: the last codec times of pruned steps at about that k, oldest first.
        other: (k, seconds) at another k before that, a far one if there was; or None.
        dense_s: the last times of dense steps, which have little to do, but something.
    """

    k: Count = 0
    times_s: tuple[Seconds, ...] = ()
    other: tuple[KeptElements, Seconds] | None = None
    dense_s: tuple[CodecTime, ...] = ()


def observe(codec: CodecTimes, k: int, time_s: float) -> CodecTimes:
    """Take in one time.

    Another k begins a new window; the median of the one before is kept if it is far away.

    Args:
        codec: what is known so far.
        k: kept elements per chunk in the step.
        time_s: what the codec took in it, seconds.
    """
    if k == CHUNK_NUMEL:
        if time_s != 0.0 and not is_time(time_s):  # a dense step may have nothing to do
            return codec
        dense_s = (*codec.dense_s, time_s)[-WINDOW_STEPS:]
        return CodecTimes(codec.k, codec.times_s, codec.other, dense_s)
    if not is_time(time_s):
        return codec
    if codec.k and not are_near(k, codec.k, _SAME):
        left = (codec.k, median(codec.times_s))
        is_kept = codec.other is None or not are_near(k, codec.k, _FAR)
        codec = codec._replace(k=k, times_s=(), other=left if is_kept else codec.other)
    times_s = (*codec.times_s, time_s)[-WINDOW_STEPS:]
    return CodecTimes(codec.k or k, times_s, codec.other, codec.dense_s)


def line_of(codec: CodecTimes) -> tuple[float, float]:
    """Seconds of the codec whatever k, and on top for every kept element per chunk."""
    if not codec.times_s:
        return 0.0, 0.0
    k, time_s = codec.k, median(codec.times_s)
    other_k, other_s = codec.other or (k, time_s)
    if are_near(k, other_k, _APART):
        return time_s, 0.0
    per_k_s = clamp((time_s - other_s) / (k - other_k), 0.0, time_s / k)
    return time_s - per_k_s * k, per_k_s


def dense_s_of(codec: CodecTimes) -> float:
    """Seconds of a dense step's own work beside its exchange; 0.0 while unknown."""
    return median(codec.dense_s) if codec.dense_s else 0.0


def are_near(k: int, other_k: int, factor: float) -> bool:
    """Whether two numbers of kept elements lie within a factor of each other."""
    return 1.0 / factor < k / other_k < factor
