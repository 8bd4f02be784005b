"""A trial of the link: what a dense exchange would take, estimated with a few small ones.

One number is summed a few times for the latency, then 32 kB in pieces. Where a piece takes less
than 20 ms the next one is four times as large, up to 16 MiB: a busy host holds up any of them. For
10 million parameters half a millisecond in 32 kB would count as 0.6 s, and in 8 MiB as 2 ms.

The largest pieces count, with those a size below, by their median: a link that rested lends its
first bytes, and one of several pieces may meet a busy host. On a slow link the trial ends early.
Every sum carries what the pieces before it took, so all ranks of a channel see the same numbers and
none has to ask.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch

from ds_gradprune.wire.channel import Channel

PIECE_BYTES = 32 * 1024
MOST_BYTES = 16 * 1024 * 1024
"""Of the first pieces, and of the largest ones."""

GROWTH = 4

LONG_S = 0.02
"""A piece that takes so long beyond the latency, mean over ranks, is large enough."""

LEAST_PIECES, MOST_PIECES = 2, 9

MOST_S = 0.1
"""No further piece is sent where those before have taken longer, mean over ranks."""

_KNOCKS = 2


def dense_seconds(channel: Channel, nbytes: int, clock: Callable[[], float]) -> float:
    """What summing fp32 gradients over the ranks of a channel would take here, in seconds.

    Args:
        channel: to the peers. What it has sent is taken from it: no report counts it.
        nbytes: of the gradients; equal on all ranks.
        clock: seconds, monotonic.

    Raises:
        TransportError, TransportTimeout: the link has failed.

    Collective: all ranks of the channel.
    """

    def lasts_s(tensor: torch.Tensor) -> float:
        began_s = clock()
        channel.start_all_reduce(tensor).wait()
        return clock() - began_s

    lasts_s(torch.zeros(1))  # the last rank has come
    latency_s = min(lasts_s(torch.zeros(1)) for _ in range(_KNOCKS))
    most = max(2, min(MOST_BYTES, nbytes) // 4)
    numel, spent_s, sizes = min(PIECE_BYTES // 4, most), list[float](), list[int]()
    while len(sizes) < MOST_PIECES:
        piece = torch.zeros(numel)
        piece[0] = sum(spent_s)
        piece[1] = spent_s[-1] - latency_s if spent_s else math.inf
        spent_s.append(lasts_s(piece))
        sizes.append(numel)
        before_s, last_s = (piece[:2] / channel.world_size).tolist()
        if len(sizes) >= LEAST_PIECES and before_s > MOST_S:
            break
        if last_s < LONG_S:
            numel = min(GROWTH * numel, most)
    channel.take_wire_bytes()
    per_element_s = statistics.median_low(
        max(0.0, lasted_s - latency_s) / size
        for lasted_s, size in zip(spent_s, sizes, strict=True)
        if GROWTH * size >= sizes[-1]
    )
    return latency_s + per_element_s * nbytes / 4
