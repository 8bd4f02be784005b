"""Cutting pieces into buckets."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune.bucket.layout import CHUNK_NUMEL
from ds_gradprune.train.buckets import bucket_numel_on, cut

PIECES = st.lists(st.tuples(st.integers(0, 3 * CHUNK_NUMEL), st.booleans(), st.booleans()))


@given(PIECES, st.integers(1, 4))
def test_every_element_is_in_one_bucket_and_chunks_stay_whole(
    pieces: list[tuple[int, bool, bool]], chunks: int
) -> None:
    offsets, end = [], 0
    for numel, _, gap in pieces:
        end += 7 * gap
        offsets.append(end)
        end += numel
    numels = [numel for numel, _, _ in pieces]
    buckets = cut(numels, [p for _, p, _ in pieces], offsets, chunks * CHUNK_NUMEL)
    covered: list[list[int]] = [[] for _ in pieces]
    for bucket in buckets:
        assert 0 < bucket.layout.numel <= chunks * CHUNK_NUMEL
        start = bucket.start
        for part, segment in zip(bucket.parts, bucket.layout.segments, strict=True):
            assert start == offsets[part.piece] + part.start
            assert segment.numel == part.stop - part.start
            assert segment.pruned == pieces[part.piece][1]
            assert part.start % CHUNK_NUMEL == 0
            covered[part.piece] += [part.start, part.stop]
            start += segment.numel
        assert start == bucket.stop
    for numel, edges in zip(numels, covered, strict=True):
        assert edges[:1] + edges[-1:] == ([0, numel] if numel else [])
        assert edges[1:-1:2] == edges[2::2]


def test_a_gap_in_the_store_ends_a_bucket() -> None:
    buckets = cut([10, 10, 10], [False] * 3, [0, 10, 25])
    assert [(b.start, b.stop) for b in buckets] == [(0, 20), (25, 35)]


def test_an_accelerator_gets_few_large_buckets() -> None:
    """Each costs it milliseconds, whatever its size: 119 of them took 0.32 s of a step."""
    numels = [124 * 2**20]
    on_host = cut(numels, [True], [0], bucket_numel_on(torch.device("cpu")))
    on_device = cut(numels, [True], [0], bucket_numel_on(torch.device("cuda")))
    assert len(on_host) == 124
    assert len(on_device) <= 4
