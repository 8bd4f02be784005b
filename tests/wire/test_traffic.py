"""Traffic formulas against values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_gradprune.wire.traffic import all_gather_bytes, all_to_all_bytes, ring_all_reduce_bytes


@pytest.mark.parametrize(
    ("tensor_bytes", "world_size", "expected"),
    [(100, 1, 0), (100, 2, 100), (100, 4, 150), (100, 3, 134), (0, 8, 0), (1, 8, 2)],
)
def test_ring_all_reduce_bytes(tensor_bytes: int, world_size: int, expected: int) -> None:
    assert ring_all_reduce_bytes(tensor_bytes, world_size) == expected


@pytest.mark.parametrize("count", [all_gather_bytes, all_to_all_bytes])
@pytest.mark.parametrize(
    ("payload_bytes", "world_size", "expected"), [(100, 1, 0), (100, 2, 100), (7, 5, 28)]
)
def test_every_peer_gets_one_payload(
    count, payload_bytes: int, world_size: int, expected: int
) -> None:
    assert count(payload_bytes, world_size) == expected


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**62), st.integers(1, 4096))
def test_ring_bytes_are_rounded_up_by_less_than_one(tensor_bytes: int, world_size: int) -> None:
    sent = ring_all_reduce_bytes(tensor_bytes, world_size)
    exact_times_n = 2 * (world_size - 1) * tensor_bytes
    assert exact_times_n <= sent * world_size < exact_times_n + world_size


@pytest.mark.parametrize(
    ("count", "name"),
    [
        (ring_all_reduce_bytes, "tensor_bytes"),
        (all_gather_bytes, "payload_bytes"),
        (all_to_all_bytes, "row_bytes"),
    ],
)
def test_bad_input_is_refused_by_name(count, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        count(-1, 2)
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        count(1, 0)
