"""Selection by the kernels: exactly the k largest, lowest index first, the very bits of t."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ds_gradprune.bucket.dispatch import addresses, tables
from ds_gradprune.bucket.layout import BucketLayout, lay_out
from ds_gradprune.native.library import Floats, Kernels, Shorts
from tests.helpers.hard_numbers import Hard, same_bits

KS = (1, 2, 41, 205, 1024, 4095, 4096)
ODD = lay_out(
    [1, 5000, 63, 8192, 4097, 7, 0, 12291], [True, True, False, True, True, False, True, True]
)
ROWS = lay_out([3 * 4096], [True])


def by_sorting(t: Floats, layout: BucketLayout, k: int) -> tuple[Shorts, Floats]:
    """The definition: a stable sort of the magnitudes' bits."""
    magnitudes = (t.view(np.uint32) & 0x7FFFFFFF).astype(np.int64)
    indices, values = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for run in layout.runs(k):
        for start in range(run.bucket_start, run.bucket_stop, run.row_numel):
            row = -magnitudes[start : start + run.row_numel]
            indices.append(np.sort(np.argsort(row, kind="stable")[: run.row_kept]))
            values.append(t[start + indices[-1]])
    return np.concatenate(indices).astype(np.int16), np.concatenate(values)


def selected(
    native: Kernels, parts: list[torch.Tensor], layout: BucketLayout, k: int, **terms: object
) -> tuple[Shorts, Floats, Floats, bool]:
    """Indices, values, dense values and whether all are finite, from one tensor per segment."""
    rows, pieces, row_segments, piece_segments = tables(layout, k)
    kept = layout.num_kept(k)
    indices, values = np.full(kept, -1, np.int16), np.full(kept, 7.0, np.float32)
    dense = np.full(layout.dense_numel, 7.0, np.float32)
    x = addresses(parts, layout, rows, row_segments)
    finite = native.select(rows, x, indices, values, **terms)
    x = addresses(parts, layout, pieces, piece_segments)
    finite &= native.load(pieces, x, dense, **terms)
    return indices, values, dense, finite


def parts_of(t: Floats, layout: BucketLayout) -> list[torch.Tensor]:
    """One tensor for each segment, each in memory of its own."""
    return [torch.from_numpy(t[s.offset : s.offset + s.numel].copy()) for s in layout.segments]


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("layout", [ROWS, ODD], ids=["rows", "odd"])
def test_selects_as_sorting_does(native: Kernels, hard: Hard, layout: BucketLayout, k: int) -> None:
    t = hard(layout.numel, k)
    for threads in (1, 3):
        got = selected(native, parts_of(t, layout), layout, k, threads=threads)
        indices, values = by_sorting(t, layout, k)
        assert np.array_equal(got[0], indices)
        assert np.array_equal(got[1].view(np.uint32), values.view(np.uint32))
        dense = [t[s.offset : s.offset + s.numel] for s in layout.segments if not s.pruned]
        assert np.array_equal(
            got[2].view(np.uint32), np.concatenate([*dense, t[:0]]).view(np.uint32)
        )
        kept = np.concatenate([values, *dense])
        assert got[3] == np.isfinite(kept).all()


@pytest.mark.parametrize("scales", [(1.0, 1.0), (-1.0, 0.3), (0.7, -2.0)])
def test_terms_are_rounded_one_by_one(
    native: Kernels, hard: Hard, scales: tuple[float, float]
) -> None:
    x, y, z = (hard(ODD.numel, seed) for seed in (1, 2, 3))
    a, b = map(np.float32, scales)
    with np.errstate(all="ignore"):
        t = (x + a * y) + b * z
    terms = {"y": y, "a": scales[0], "z": z, "b": scales[1]}
    indices, values, dense, _ = selected(native, parts_of(x, ODD), ODD, 205, **terms)
    want_indices, want_values = by_sorting(t, ODD, 205)
    if not np.isnan(t).any():  # of which nan it is, nothing is promised
        assert np.array_equal(indices, want_indices)
        assert np.array_equal(values.view(np.uint32), want_values.view(np.uint32))
    flat = [t[s.offset : s.offset + s.numel] for s in ODD.segments if not s.pruned]
    assert same_bits(dense, np.concatenate(flat))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_sixteen_bits(native: Kernels, dtype: torch.dtype) -> None:
    """Every number of 16 bits but nan, beside a residual."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    layout = lay_out([every.numel()], [True])
    y = np.random.default_rng(0).standard_normal(every.numel(), dtype=np.float32)
    t = every.float().numpy() + np.float32(0.5) * y
    name = str(dtype).removeprefix("torch.")
    for threads in (1, 2):
        got = selected(native, [every], layout, 300, y=y, a=0.5, dtype=name, threads=threads)
        indices, values = by_sorting(t, layout, 300)
        assert np.array_equal(got[0], indices)
        assert np.array_equal(got[1].view(np.uint32), values.view(np.uint32))
    dense = lay_out([every.numel()], [False])
    loaded = selected(native, [every], dense, 1, dtype=name)[2]
    assert np.array_equal(loaded.view(np.uint32), every.float().numpy().view(np.uint32))


def test_rows_of_different_scale_follow_each_other(native: Kernels) -> None:
    """A row's threshold tells nothing of the next one's; that costs time, never exactness."""
    rng = np.random.default_rng(0)
    layout = lay_out([64 * 4096], [True])
    scales = (10.0 ** rng.uniform(-44, 37, 64)).astype(np.float32)
    t = rng.standard_normal((64, 4096), dtype=np.float32) * scales[:, None]
    for k in (1, 41, 1024):
        got = selected(native, [torch.from_numpy(t.reshape(-1))], layout, k)
        assert np.array_equal(got[0], by_sorting(t.reshape(-1), layout, k)[0])


def test_a_threshold_among_equals_keeps_the_first(native: Kernels) -> None:
    t = np.full(4096, 0.5, np.float32)
    t[100:200] = -1.0
    layout = lay_out([4096], [True])
    for k, kept in (
        (100, range(100, 200)),
        (40, range(100, 140)),
        (150, [*range(50), *range(100, 200)]),
    ):
        indices = selected(native, [torch.from_numpy(t)], layout, k)[0]
        assert indices.tolist() == list(kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": np.empty(4, np.int16)}, "must have 5 elements, got 4"),
        ({"indices": np.empty(5, np.int32)}, "contiguous int16"),
        ({"values": np.empty(10, np.float32)[::2]}, "contiguous float32"),
        ({"dtype": "float64"}, "dtype must be one of"),
        ({"x": np.zeros(2, np.int64)}, "must have 1 elements, got 2"),
    ],
)
def test_wrong_arrays_are_refused(native: Kernels, change: dict[str, object], message: str) -> None:
    t = np.zeros(100, np.float32)
    rows = np.array([[0, 1, 100, 5, 0]])
    arguments = {
        "rows": rows,
        "x": np.array([t.ctypes.data]),
        "indices": np.empty(5, np.int16),
        "values": np.empty(5, np.float32),
    }
    with pytest.raises(ValueError, match=message):
        native.select(**(arguments | change))
