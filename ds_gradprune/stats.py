"""Formulas for traffic and bandwidth, with units. Knows nothing of the rest of the package.

Bandwidths are bytes per second (1 GB = 10^9 bytes). DeepSpeed's own comms logger prints Gbit/s and
a doubled algorithm bandwidth: its figures are not comparable with these.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]


def algbw_bytes_per_s(total_bytes: int, time_s: float) -> float:
    """Algorithm bandwidth of one collective: S / t.

    Args:
        total_bytes: size S of the operation; for all_gather and reduce_scatter the bytes of all
            ranks together, >= 0.
        time_s: wall clock of the call, seconds, > 0.

    Returns:
        Bytes per second.

    Raises:
        ValueError: an argument is out of range.

    References:
        NVIDIA nccl-tests, doc/PERFORMANCE.md, "Algorithm bandwidth".
    """
    _at_least("total_bytes", total_bytes, 0)
    if not (math.isfinite(time_s) and time_s > 0.0):
        raise ValueError(f"time_s must be finite and greater than 0, got {time_s!r}.")
    return total_bytes / time_s


def busbw_bytes_per_s(
    total_bytes: int, time_s: float, world_size: int, collective: Collective
) -> float:
    """Bus bandwidth of one collective: comparable with the link's own, whatever the world size.

    algbw times 2(N-1)/N for all_reduce, (N-1)/N for all_gather and reduce_scatter, 1 for broadcast.

    Args:
        total_bytes: size S of the operation, as for `algbw_bytes_per_s`.
        time_s: wall clock of the call, seconds, > 0.
        world_size: ranks N, >= 1. One rank moves nothing: 0, whatever the collective.
        collective: which operation it was.

    Returns:
        Bytes per second.

    Raises:
        ValueError: an argument is out of range.

    References:
        NVIDIA nccl-tests, doc/PERFORMANCE.md, "Bus bandwidth".
    """
    _at_least("world_size", world_size, 1)
    algbw = algbw_bytes_per_s(total_bytes, time_s)
    if collective not in get_args(Collective):
        known = ", ".join(get_args(Collective))
        raise ValueError(f"collective must be one of {known}, got {collective!r}.")
    if world_size == 1:
        return 0.0
    if collective == "broadcast":
        return algbw
    passes = 2 if collective == "all_reduce" else 1
    return algbw * passes * (world_size - 1) / world_size


def compression_rate(dense_bytes: int, wire_bytes: int) -> float:
    """How many times fewer bytes than dense: dense_bytes / wire_bytes; below 1 it is an expansion.

    Args:
        dense_bytes: bytes the same step would send without pruning, >= 0.
        wire_bytes: bytes it did send, > 0.

    Returns:
        A pure number.

    Raises:
        ValueError: an argument is out of range.
    """
    _at_least("dense_bytes", dense_bytes, 0)
    _at_least("wire_bytes", wire_bytes, 1)
    return dense_bytes / wire_bytes


def ring_all_reduce_bytes(tensor_bytes: int, world_size: int) -> int:
    """Bytes each rank sends in a ring all-reduce: 2(N-1)/N * S, rounded up.

    Args:
        tensor_bytes: bytes S of the tensor on one rank, >= 0.
        world_size: ranks N, >= 1. One rank sends nothing.

    Returns:
        Bytes.

    Raises:
        ValueError: an argument is out of range.

    References:
        NVIDIA nccl-tests, doc/PERFORMANCE.md, "AllReduce".
    """
    _at_least("tensor_bytes", tensor_bytes, 0)
    _at_least("world_size", world_size, 1)
    return -(-2 * (world_size - 1) * tensor_bytes // world_size)


def all_gather_bytes(payload_bytes: int, world_size: int) -> int:
    """Bytes each rank sends in an all-gather of equal payloads: (N-1) * payload.

    Args:
        payload_bytes: bytes of one rank's payload, >= 0.
        world_size: ranks N, >= 1. One rank sends nothing.

    Returns:
        Bytes.

    Raises:
        ValueError: an argument is out of range.

    References:
        NVIDIA nccl-tests, doc/PERFORMANCE.md, "AllGather": S there is the sum over ranks.
    """
    _at_least("payload_bytes", payload_bytes, 0)
    _at_least("world_size", world_size, 1)
    return (world_size - 1) * payload_bytes


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}.")
