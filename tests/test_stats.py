"""Traffic and bandwidth formulas against values worked out by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_gradprune.stats import (
    algbw_bytes_per_s,
    all_gather_bytes,
    busbw_bytes_per_s,
    compression_rate,
    ring_all_reduce_bytes,
)


def test_algbw_is_size_over_time() -> None:
    assert algbw_bytes_per_s(1_000_000_000, 0.5) == 2e9
    assert algbw_bytes_per_s(0, 0.5) == 0.0


@pytest.mark.parametrize(
    ("collective", "world_size", "expected"),
    [
        # 8 GB in 2 s is 4 GB/s; the factors are those of the nccl-tests page.
        ("all_reduce", 4, 6e9),
        ("all_reduce", 2, 4e9),
        ("all_gather", 4, 3e9),
        ("reduce_scatter", 4, 3e9),
        ("broadcast", 4, 4e9),
        ("all_reduce", 1, 0.0),
        ("all_gather", 1, 0.0),
        ("broadcast", 1, 0.0),
    ],
)
def test_busbw_factor_of_each_collective(collective, world_size, expected) -> None:
    assert busbw_bytes_per_s(8_000_000_000, 2.0, world_size, collective) == expected


def test_busbw_of_an_unloaded_ring_is_the_link_rate() -> None:
    # Each rank sends ring_all_reduce_bytes over a link of 12.5 MB/s (100 Mbit/s).
    tensor_bytes, world_size, link_bytes_per_s = 4_000_000, 5, 12.5e6
    time_s = ring_all_reduce_bytes(tensor_bytes, world_size) / link_bytes_per_s
    busbw = busbw_bytes_per_s(tensor_bytes, time_s, world_size, "all_reduce")
    assert busbw == pytest.approx(link_bytes_per_s, rel=1e-12)


def test_compression_rate_is_dense_over_wire() -> None:
    assert compression_rate(400, 40) == 10.0
    assert compression_rate(40, 400) == 0.1
    assert compression_rate(0, 1) == 0.0


@pytest.mark.parametrize(
    ("tensor_bytes", "world_size", "expected"),
    [(100, 1, 0), (100, 2, 100), (100, 4, 150), (100, 3, 134), (0, 8, 0), (1, 8, 2)],
)
def test_ring_all_reduce_bytes(tensor_bytes, world_size, expected) -> None:
    assert ring_all_reduce_bytes(tensor_bytes, world_size) == expected


@pytest.mark.parametrize(
    ("payload_bytes", "world_size", "expected"), [(100, 1, 0), (100, 2, 100), (7, 5, 28)]
)
def test_all_gather_bytes(payload_bytes, world_size, expected) -> None:
    assert all_gather_bytes(payload_bytes, world_size) == expected


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**62), st.integers(1, 4096))
def test_ring_bytes_are_rounded_up_by_less_than_one(tensor_bytes, world_size) -> None:
    sent = ring_all_reduce_bytes(tensor_bytes, world_size)
    exact_times_n = 2 * (world_size - 1) * tensor_bytes
    assert exact_times_n <= sent * world_size < exact_times_n + world_size


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="time_s must be finite and greater than 0, got 0"):
        algbw_bytes_per_s(1, 0.0)
    with pytest.raises(ValueError, match="time_s must be finite and greater than 0, got nan"):
        algbw_bytes_per_s(1, float("nan"))
    with pytest.raises(ValueError, match="time_s must be finite and greater than 0, got inf"):
        algbw_bytes_per_s(1, float("inf"))
    with pytest.raises(ValueError, match="total_bytes must be at least 0, got -1"):
        algbw_bytes_per_s(-1, 1.0)
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        busbw_bytes_per_s(1, 1.0, 0, "all_reduce")
    with pytest.raises(ValueError, match=r"collective must be one of all_reduce, .*'gather'"):
        busbw_bytes_per_s(1, 1.0, 2, "gather")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wire_bytes must be at least 1, got 0"):
        compression_rate(1, 0)
    with pytest.raises(ValueError, match="dense_bytes must be at least 0, got -1"):
        compression_rate(-1, 1)
    with pytest.raises(ValueError, match="tensor_bytes must be at least 0, got -1"):
        ring_all_reduce_bytes(-1, 2)
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        ring_all_reduce_bytes(1, 0)
    with pytest.raises(ValueError, match="payload_bytes must be at least 0, got -1"):
        all_gather_bytes(-1, 2)
    with pytest.raises(ValueError, match="world_size must be at least 1, got -3"):
        all_gather_bytes(1, -3)
