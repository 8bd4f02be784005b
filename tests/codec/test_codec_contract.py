"""Every codec, one table: what arrives is what was sent, in the memory that was given."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune import codec
from ds_gradprune.bucket.block import Scratch, empty_block
from ds_gradprune.bucket.layout import BucketLayout, lay_out
from ds_gradprune.bucket.select import select
from ds_gradprune.codec import CODECS, HEADER_BYTES, Codec, codec_for
from ds_gradprune.codec.places import places_bytes
from tests.helpers.buckets import bits
from tests.helpers.payloads import (
    CASES,
    LAYOUTS,
    SIGNALS,
    SMALL,
    K,
    assert_refused,
    encode,
    layout,
    small_payload,
    through,
)

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.mark.parametrize(("written", "bucket", "k"), CASES)
def test_what_arrives_is_what_was_sent(written: Codec, bucket: BucketLayout, k: int) -> None:
    block = select(torch.randn(bucket.numel), bucket, k)
    payload = encode(written, block)
    assert payload.dtype == torch.uint8
    assert payload.shape == (written.payload_bytes(bucket, k),)
    header, arrived = codec.decode(payload, bucket)
    assert header == codec.Header(
        step=12,
        bucket=3,
        rank=1,
        codec_id=written.codec_id,
        k=k,
        numel=bucket.numel,
        layout_crc=bucket.crc,
        signals=SIGNALS,
    )
    assert (arrived.layout, arrived.k) == (bucket, k)
    assert arrived.indices.dtype == torch.int16
    assert torch.equal(arrived.indices, block.indices)
    assert arrived.values.dtype == arrived.dense.dtype == torch.float32
    for ours, theirs in ((block.values, arrived.values), (block.dense, arrived.dense)):
        assert bool((theirs.abs() <= 2 * ours.abs()).all())
        if written.values.bits >= 16:
            assert bool(((theirs - ours).abs() <= ours.abs() * 2.0**-8).all())
    if written.values.bits >= 16:  # levels are chosen anew
        # What was decoded is a fixed point: sending it again sends the same bytes.
        assert torch.equal(encode(written, arrived), payload)


@pytest.mark.parametrize(("written", "k"), SMALL)
def test_bodies_are_checked_first_and_read_into_kept_memory(written: Codec, k: int) -> None:
    bucket = layout((1, 120), (3,))
    scratch = Scratch()
    for seed in range(3):
        t = torch.randn(bucket.numel, generator=torch.Generator().manual_seed(seed))
        payload = encode(written, select(t, bucket, k))
        header, expected = codec.decode(payload, bucket)
        written.check(header, payload, bucket)
        out = scratch.block(bucket, k)
        assert written.read_body(header, payload, bucket, out, checked=True) is out
        for name in ("indices", "values", "dense"):
            assert torch.equal(getattr(out, name), getattr(expected, name))


def test_a_block_of_another_layout_or_k_is_refused() -> None:
    payload, bucket = small_payload(codec_for(7, 16), 7)
    header, written = codec.read_header(payload), codec_for(7, 16)
    for out in (empty_block(bucket, 6), empty_block(layout((1, 120), (3,)), 7)):
        with pytest.raises(ValueError, match="out must be a block of BucketLayout"):
            written.read_body(header, payload, bucket, out)


@pytest.mark.parametrize("value_bits", [16, 32])
def test_rounding_is_the_best_of_the_width(value_bits: int) -> None:
    t = torch.cat([torch.randn(2000), torch.randn(2000) * 1e-30, torch.randn(96) * 1e38])
    t[:4] = torch.tensor([0.0, -0.0, 1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8])
    sent = through(codec_for(4096, value_bits), select(t, lay_out([4096], [True]), 4096)).values
    if value_bits == 32:
        assert torch.equal(bits(sent), bits(t))
        return
    # bfloat16 keeps 8 significant bits: half a unit in the last place is 2**-8 of a power of two
    # that is at most the magnitude itself.
    assert bool(((sent - t).abs() <= t.abs() * 2.0**-8).all())
    assert sent[:4].tolist() == [0.0, 0.0, 1.0, 1.0 + 2 * 2.0**-7]  # ties go to even
    assert math.copysign(1.0, float(sent[1])) == -1.0


def test_bfloat16_saturates_and_never_becomes_infinite() -> None:
    largest = torch.finfo(torch.bfloat16).max
    beyond = torch.finfo(torch.float32).max
    t = torch.tensor([[largest, -largest, beyond, -beyond, float("inf"), -float("inf")] * 20])
    block = select(t.view(-1), layout((1, 120)), 4096)
    sent = through(codec_for(41, 16), block).values
    assert sent.view(-1, 6)[0].tolist() == [largest, -largest] * 3


@pytest.mark.parametrize(("written", "k"), SMALL)
def test_nan_is_refused_unless_the_header_tells(written: Codec, k: int) -> None:
    bucket = layout((1, 120), (3,))
    block = select(torch.full((bucket.numel,), float("nan")), bucket, k)
    arrived = through(written, block, dataclasses.replace(SIGNALS, nonfinite=True))
    assert bool(arrived.values.isnan().all())
    assert bool(arrived.dense.isnan().all())
    assert_refused(encode(written, block), bucket, "payload's values must be finite unless")
    block.values.fill_(1.0)
    assert_refused(encode(written, block), bucket, "payload's values must be finite unless")


def test_inf_is_refused_unless_the_header_tells() -> None:
    block = select(torch.full((120,), -math.inf), layout((1, 120)), 7)
    arrived = through(codec_for(7, 32), block, dataclasses.replace(SIGNALS, nonfinite=True))
    assert torch.equal(arrived.values, block.values)
    assert_refused(encode(codec_for(7, 32), block), block.layout, "values must be finite unless")


@pytest.mark.parametrize("place", [0, 4095])
def test_first_and_last_place_of_a_row(place: int) -> None:
    t = torch.zeros(8192)
    t[place] = t[4096 + place] = -1.5
    bucket = layout((2, 4096))
    arrived = codec.decode(encode(codec_for(1, 16), select(t, bucket, 1)), bucket)[1]
    assert arrived.indices.tolist() == [place, place]
    assert arrived.values.tolist() == [-1.5, -1.5]


def test_sizes_are_what_the_format_says() -> None:
    bucket = layout((3, 4096), (5,))
    # 64 header; 3 * 41 = 123 values and 5 dense ones. Places: 6 low bits of 123 indices, and in
    # every row 41 ones and 63 zeros for what is above them: 93 and 39 bytes.
    places = 93 + 39
    assert codec_for(41, 32).payload_bytes(bucket, 41) == 64 + 4 * 128 + places
    assert codec_for(41, 16).payload_bytes(bucket, 41) == 64 + 2 * 128 + places
    # Two scales of 2 bytes for up to 128 values; up to 4 bytes.
    assert codec_for(41, 4).payload_bytes(bucket, 41) == 64 + (4 + 62) + (4 + 3) + places + 3
    assert codec_for(41, 2).payload_bytes(bucket, 41) == 64 + (4 + 31) + (4 + 3) + places + 2
    assert codec_for(4096, 16).payload_bytes(bucket, 4096) == 64 + 2 * (3 * 4096 + 5) + 2
    assert codec_for(4096, 4).payload_bytes(bucket, 4096) == 64 + 96 * (4 + 64) + (4 + 3) + 1
    # 3 indices of 12 bits; a bitmap of 3 rows.
    assert codec_for(1, 16).payload_bytes(bucket, 1) == 64 + 2 * 8 + 5 + 3
    assert codec_for(2048, 16).payload_bytes(bucket, 2048) == 64 + 2 * (3 * 2048 + 5) + 3 * 512 + 2


@given(st.sampled_from(list(LAYOUTS)), st.sampled_from(K), st.sampled_from([2, 4, 16, 32]))
def test_size_counts_what_selection_keeps(name: str, k: int, value_bits: int) -> None:
    bucket = LAYOUTS[name]
    kept, dense = bucket.num_kept(k), bucket.dense_numel
    scales = [4 * math.ceil(n / 128) if value_bits < 16 else 0 for n in (kept, dense)]
    body = scales[0] + math.ceil(kept * value_bits / 8) + places_bytes(bucket, k)
    body += scales[1] + math.ceil(dense * max(4, value_bits) / 8)
    expected = HEADER_BYTES + 4 * math.ceil(body / 4)
    assert codec_for(k, value_bits).payload_bytes(bucket, k) == expected


@pytest.mark.parametrize(("written", "k"), SMALL)
def test_encodes_into_the_callers_memory(written: Codec, k: int) -> None:
    bucket = layout((1, 120), (3,))
    block = select(torch.randn(bucket.numel), bucket, k)
    size = written.payload_bytes(bucket, k)
    expected = encode(written, block)
    for offset in range(9):  # aligned or not
        room = torch.full((size + 16,), 0xAA, dtype=torch.uint8)
        out = room[offset : offset + size]
        result = written.encode(block, step=12, bucket=3, rank=1, signals=SIGNALS, out=out)
        assert result.data_ptr() == out.data_ptr()
        assert torch.equal(result, expected)
        arrived = codec.decode(result, bucket)[1]
        assert torch.equal(arrived.indices, block.indices)
        assert torch.equal(arrived.values, codec.decode(expected, bucket)[1].values)
        assert bool((room[:offset] == 0xAA).all())
        assert bool((room[offset + size :] == 0xAA).all())


@pytest.mark.parametrize("written", CODECS.values(), ids=lambda written: written.name)
def test_payloads_follow_each_other_in_one_message(written: Codec) -> None:
    """As they travel: one after the other without a gap, each at a multiple of 4 bytes."""
    buckets = [LAYOUTS[name] for name in ("tail", "mixed", "all dense", "empty", "short")]
    blocks = [select(torch.randn(bucket.numel), bucket, 41) for bucket in buckets]
    sizes = [written.payload_bytes(bucket, 41) for bucket in buckets]
    assert not any(size % 4 for size in sizes)
    message = torch.empty(sum(sizes), dtype=torch.uint8)
    for number, (block, row) in enumerate(zip(blocks, message.split(sizes), strict=True)):
        written.encode(block, step=12, bucket=number, rank=1, signals=SIGNALS, out=row)
    for number, (block, row) in enumerate(zip(blocks, message.split(sizes), strict=True)):
        header, arrived = codec.decode(row, block.layout)
        assert header.bucket == number
        assert torch.equal(arrived.indices, block.indices)


def test_choice_of_codec() -> None:
    names = {width: codec_for(41, width).name for width in (2, 4, 16, 32)}
    assert names == {2: "2bit", 4: "4bit", 16: "bf16", 32: "fp32"}
    with pytest.raises(ValueError, match=r"value_bits must be one of \[2, 4, 16, 32\], got 8"):
        codec_for(41, 8)
    with pytest.raises(ValueError, match=r"k must be in 1 \.\. 4096, got 0"):
        codec_for(0, 16)


@pytest.mark.parametrize("written", CODECS.values(), ids=lambda written: written.name)
def test_nothing_of_the_size_of_a_block_is_allocated(written: Codec) -> None:
    bucket = lay_out([2**22, 2**20], [True, False])
    block = select(torch.randn(bucket.numel), bucket, 2048)
    payload = torch.empty(written.payload_bytes(bucket, 2048), dtype=torch.uint8)
    out = empty_block(bucket, 2048)
    tracemalloc.start()
    written.encode(block, step=12, bucket=3, rank=1, signals=SIGNALS, out=payload)
    header = codec.read_header(payload)
    written.check(header, payload, bucket)
    written.read_body(header, payload, bucket, out, checked=True)
    _, numpy_peak = tracemalloc.get_traced_memory()  # numpy reports its arrays, torch does not
    tracemalloc.stop()
    assert numpy_peak < 2**22 < 2 * bucket.num_kept(2048) + 4
