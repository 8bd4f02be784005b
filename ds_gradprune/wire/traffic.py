"""Bytes that each rank sends in a collective. Knows nothing of the rest of the package."""

from __future__ import annotations


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


def all_to_all_bytes(row_bytes: int, world_size: int) -> int:
    """Bytes each rank sends in an all-to-all of equal rows: (N-1) * row; its own row stays.

    Args:
        row_bytes: bytes of what one rank has for one rank, >= 0.
        world_size: ranks N, >= 1. One rank sends nothing.

    Returns:
        Bytes.

    Raises:
        ValueError: an argument is out of range.
    """
    _at_least("row_bytes", row_bytes, 0)
    _at_least("world_size", world_size, 1)
    return (world_size - 1) * row_bytes


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}.")
