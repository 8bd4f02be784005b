"""A trial of the link: what a dense exchange would take, estimated with a few small ones.

One number is summed a few times for the latency, then up to 256 kB in pieces. A piece counts by the
median of the second half, because a link that rested lends its first bytes, and one of several may
meet a busy host. On a slow link the trial ends early: every sum carries what the pieces before it
took, so all ranks of a channel see the same number and none has to ask.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from ds_gradprune.wire.channel import Channel

PIECE_BYTES = 32 * 1024
MOST_PIECES = 8
LEAST_PIECES = 2

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
    numel = max(1, min(PIECE_BYTES, nbytes) // 4)
    piece, spent_s = torch.zeros(numel), list[float]()
    for number in range(MOST_PIECES):
        piece.zero_()
        piece[0] = sum(spent_s)
        spent_s.append(lasts_s(piece))
        if number + 1 >= LEAST_PIECES and float(piece[0]) > MOST_S * channel.world_size:
            break
    channel.take_wire_bytes()
    piece_s = max(0.0, statistics.median(spent_s[len(spent_s) // 2 :]) - latency_s)
    return latency_s + piece_s * nbytes / (4 * numel)
