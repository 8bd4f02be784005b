"""Layouts by shape, blocks in plain words, and the choice of native kernels or references."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator

import pytest
import torch

from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.bucket.layout import CHUNK_NUMEL, BucketLayout, lay_out
from ds_gradprune.native import library


@pytest.fixture(scope="module", params=["reference", "native"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """For modules that use this fixture: once the references alone, once the native kernels."""
    if request.param == "native":
        if library.kernels() is None:
            pytest.skip("needs the native kernels, so a C++ compiler")
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "kernels", lambda: None)
        yield request.param


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accelerator's kernels work on CPU memory, in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, which comes with torch's builds for GPUs")
    if torch.cuda.is_available():
        pytest.skip("needs a process without a GPU, where Triton interprets")
    monkeypatch.setenv("DS_GRADPRUNE_TRITON", "interpret")


def layout_by_shape(*shapes: tuple[int, ...], min_numel: int = 1000) -> BucketLayout:
    """Tensors of more than one dimension and at least `min_numel` elements are pruned."""
    numels = [math.prod(shape) for shape in shapes]
    pruned = [
        len(shape) > 1 and numel >= min_numel for shape, numel in zip(shapes, numels, strict=True)
    ]
    return lay_out(numels, pruned)


def rows_of(layout: BucketLayout) -> list[tuple[int, int]]:
    """(first element, length) of every row, straight from the definition."""
    return [
        (start, min(CHUNK_NUMEL, segment.offset + segment.numel - start))
        for segment in layout.segments
        if segment.pruned
        for start in range(segment.offset, segment.offset + segment.numel, CHUNK_NUMEL)
    ]


def kept_positions(block: SparseBlock) -> torch.Tensor:
    """(num_kept,) int64: where the kept elements lie in the bucket."""
    starts, counts = [], []
    for start, length in rows_of(block.layout):
        starts.append(start)
        counts.append(math.ceil(block.k * length / CHUNK_NUMEL))
    return torch.tensor(starts, dtype=torch.int64).repeat_interleave(
        torch.tensor(counts, dtype=torch.int64)
    ) + block.indices.to(torch.int64)


def dense_positions(layout: BucketLayout) -> torch.Tensor:
    """(dense_numel,) int64: where the dense elements lie in the bucket."""
    ranges = [torch.arange(s.offset, s.offset + s.numel) for s in layout.segments if not s.pruned]
    return torch.cat([torch.empty(0, dtype=torch.int64), *ranges])


def flat(block: SparseBlock) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions in the bucket, int64, and values of everything a block carries."""
    positions = torch.cat([kept_positions(block), dense_positions(block.layout)])
    return positions, torch.cat([block.values, block.dense])


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bits of float32 numbers, which also tell 0.0 from -0.0 and one nan from another."""
    return t.contiguous().view(torch.int32)
