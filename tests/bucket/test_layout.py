"""What lies where: segments, runs, counts, and the number that ranks compare."""

from __future__ import annotations

import gc
import json
import math
import struct
import weakref
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune.bucket.layout import (
    CHUNK_NUMEL,
    BucketLayout,
    Run,
    Segment,
    kept_per_chunk,
    lay_out,
)
from tests.helpers.buckets import rows_of

sizes = st.lists(
    st.tuples(st.sampled_from([0, 1, 7, 4095, 4096, 4097, 12288, 13000]), st.booleans()),
    max_size=6,
)
GOLDEN = Path(__file__).parents[1] / "golden" / "v2"
BODILESS = {"signals", "signals-unknown", "announcement"}


def test_layout_lies_without_gaps_and_sums_up() -> None:
    layout = lay_out([1000, 990, 0, 1, 5000], [True, False, False, False, True])
    assert [s.offset for s in layout.segments] == [0, 1000, 1990, 1990, 1991]
    assert [s.pruned for s in layout.segments] == [True, False, False, False, True]
    assert (layout.numel, layout.pruned_numel, layout.dense_numel) == (6991, 6000, 991)
    assert layout.dense_runs == ((1000, 991),)
    assert repr(layout) == (
        f"BucketLayout(5 segments, 6000 pruned + 991 dense elements, crc {layout.crc:08x})"
    )


def test_dense_neighbours_are_one_run_and_empty_ones_none() -> None:
    layout = lay_out([3, 0, 4, 5, 0, 6], [False, True, False, True, False, False])
    assert layout.dense_runs == ((0, 7), (12, 6))


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment(0, 5, True), Segment(6, 1, True)], r"segments\[1\]\.offset must be 5, .* got 6"),
        ([Segment(1, 5, True)], r"segments\[0\]\.offset must be 0, .* got 1"),
        ([Segment(0, -1, True)], r"segments\[0\]\.numel must be at least 0, got -1"),
    ],
)
def test_gaps_overlaps_and_negative_sizes_are_refused(
    segments: list[Segment], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BucketLayout(segments)


def test_one_flag_per_tensor() -> None:
    with pytest.raises(ValueError, match="one entry per tensor, got 2 and 1"):
        lay_out([1, 2], [True])


def test_layouts_are_told_apart_by_identity_and_compared_by_crc() -> None:
    one, same, other = (lay_out([4096, n], [True, False]) for n in (5, 5, 6))
    assert one != same
    assert len({one, same, other}) == 3
    assert one.crc == same.crc
    assert one.crc != other.crc
    flags = lay_out([4096, 5], [True, True])
    assert len({one.crc, other.crc, flags.crc, lay_out([4101], [True]).crc}) == 4


def test_crc_is_that_of_the_released_format() -> None:
    """The crc of a layout stands in every golden payload."""
    paths = [path for path in sorted(GOLDEN.glob("*.json")) if path.stem not in BODILESS]
    assert paths
    for path in paths:
        segments = json.loads(path.read_text(encoding="utf-8"))["segments"]
        (crc,) = struct.unpack_from("<I", path.with_suffix(".bin").read_bytes(), 20)
        assert BucketLayout([Segment(*entry) for entry in segments]).crc == crc


# --- rows -----------------------------------------------------------------------------------------


@given(sizes, st.sampled_from([1, 2, 41, 2048, 4095, 4096]))
def test_runs_are_the_rows_of_the_definition(parts: list[tuple[int, bool]], k: int) -> None:
    layout = lay_out([n for n, _ in parts], [p for _, p in parts])
    rows, kept_start = [], 0
    for run in layout.runs(k):
        segment = layout.segments[run.segment]
        assert segment.pruned
        assert (
            segment.offset <= run.bucket_start < run.bucket_stop <= segment.offset + segment.numel
        )
        assert run.kept_start == kept_start
        assert run.row_kept == math.ceil(k * run.row_numel / CHUNK_NUMEL)
        kept_start = run.kept_stop
        rows += [(run.rows(i, i + 1).bucket_start, run.row_numel) for i in range(run.num_rows)]
    assert rows == rows_of(layout)
    assert layout.num_kept(k) == kept_start


def test_runs_never_reach_over_segments() -> None:
    """Segments may lie in different memory, even where they are neighbours in the bucket."""
    layout = lay_out([8192, 4096, 4100], [True, True, True])
    assert layout.runs(10) == (
        Run(0, 0, 2, 4096, 10, 0),
        Run(1, 8192, 1, 4096, 10, 20),
        Run(2, 12288, 1, 4096, 10, 30),
        Run(2, 16384, 1, 4, 1, 40),
    )


def test_rows_of_a_run() -> None:
    run = Run(3, 100, 5, 4096, 41, 7)
    assert run.rows(2, 4) == Run(3, 100 + 2 * 4096, 2, 4096, 41, 7 + 82)
    assert (run.bucket_stop, run.kept_stop) == (100 + 5 * 4096, 7 + 5 * 41)


@pytest.mark.parametrize("k", [0, -1, 4097])
def test_k_outside_its_range_is_refused(k: int) -> None:
    layout = lay_out([4096], [True])
    for ask in (layout.runs, layout.num_kept):
        with pytest.raises(ValueError, match=r"k must be in 1 \.\. 4096, got"):
            ask(k)


def test_tables_are_made_once_die_with_the_layout_and_stay_few() -> None:
    layout = lay_out([4096], [True])
    assert layout.runs(5) is layout.runs(5)
    for k in range(1, 300):
        layout.num_kept(k)
    assert len(layout._derived) <= 64
    last = weakref.ref(layout)
    del layout
    gc.collect()
    assert last() is None


@pytest.mark.parametrize(
    ("density", "k"), [(1.0, 4096), (1e-9, 1), (0.01, 41), (1 / 4096, 1), (1.5 / 4096, 2)]
)
def test_density_becomes_elements_of_a_row(density: float, k: int) -> None:
    assert kept_per_chunk(density) == k


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, math.nan])
def test_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got"):
        kept_per_chunk(density)
