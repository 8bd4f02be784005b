"""A bucket dealt out to owners: every element once, no row cut, a share is a slice of a block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune.bucket.layout import CHUNK_NUMEL, BucketLayout, lay_out
from ds_gradprune.bucket.select import select
from ds_gradprune.wire.shares import share_out, whole
from tests.helpers.buckets import bits

SEGMENTS = st.lists(st.tuples(st.integers(0, 4 * CHUNK_NUMEL), st.booleans()), max_size=5)


def made(segments: list[tuple[int, bool]]) -> BucketLayout:
    return lay_out([numel for numel, _ in segments], [pruned for _, pruned in segments])


@given(SEGMENTS, st.integers(1, 9))
def test_every_element_has_one_owner(segments: list[tuple[int, bool]], count: int) -> None:
    layout = made(segments)
    owned = torch.zeros(layout.numel, dtype=torch.int64)
    shares = share_out(layout, count)
    assert len(shares) == count
    for share in shares:
        assert share.layout.numel == sum(piece.numel for piece in share.pieces)
        for piece in share.pieces:
            owned[piece.bucket_start : piece.bucket_start + piece.numel] += 1
    assert bool((owned == 1).all())
    assert sum(share.layout.pruned_numel for share in shares) == layout.pruned_numel


@given(SEGMENTS, st.integers(1, 9), st.integers(1, CHUNK_NUMEL))
def test_selecting_in_every_share_is_selecting_in_the_bucket(
    segments: list[tuple[int, bool]], count: int, k: int
) -> None:
    layout = made(segments)
    vector = torch.randn(layout.numel, generator=torch.Generator().manual_seed(k))
    block = select(vector, layout, k)
    for share in share_out(layout, count):
        part = share.of(block)
        own = torch.cat(
            [torch.empty(0)]
            + [vector[p.bucket_start : p.bucket_start + p.numel] for p in share.pieces]
        )
        alone = select(own, share.layout, k)
        assert torch.equal(part.indices, alone.indices)
        assert torch.equal(bits(part.values), bits(alone.values))
        assert torch.equal(bits(part.dense), bits(alone.dense))
        if part.values.numel():  # a view: what is written there is written into the block
            assert part.values.untyped_storage().data_ptr() == (
                block.values.untyped_storage().data_ptr()
            )


def test_shares_are_equal_but_for_a_row_and_an_element() -> None:
    layout = made([(50 * CHUNK_NUMEL, True), (999, False), (30 * CHUNK_NUMEL, True), (2, False)])
    shares = share_out(layout, 16)
    assert {share.layout.pruned_numel for share in shares} == {5 * CHUNK_NUMEL}
    assert {share.layout.dense_numel for share in shares} <= {62, 63}


def test_shares_are_made_once_and_the_whole_is_the_layout_itself() -> None:
    layout = made([(5 * CHUNK_NUMEL, True), (7, False)])
    assert share_out(layout, 3) is share_out(layout, 3)
    (share,) = whole(layout)
    assert share.layout is layout
    block = select(torch.randn(layout.numel), layout, 9)
    assert share.of(block) is block


@pytest.mark.parametrize("segments", [[], [(0, True)], [(0, False)]])
def test_an_empty_bucket_has_empty_shares(segments: list[tuple[int, bool]]) -> None:
    assert [share.layout.numel for share in share_out(made(segments), 3)] == [0, 0, 0]
    assert whole(made(segments))[0].pieces == ()
