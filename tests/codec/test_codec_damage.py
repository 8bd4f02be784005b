"""Arbitrary bytes must never do more than raise one error, in `check` and in reading alike."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune import codec
from ds_gradprune.bucket.select import select
from ds_gradprune.codec import CODECS, Codec, codec_for
from ds_gradprune.errors import WireFormatError
from tests.helpers.buckets import kept_positions
from tests.helpers.payloads import (
    LAYOUTS,
    SIGNALS,
    SMALL,
    as_tensor,
    assert_refused,
    encode,
    layout,
    resealed,
    small_payload,
)

pytestmark = pytest.mark.usefixtures("implementation")


def test_blocks_that_contradict_themselves_are_refused() -> None:
    block = select(torch.zeros(123), layout((1, 120), (3,)), 2000)
    for name in ("indices", "values", "dense"):
        wrong = dataclasses.replace(block, **{name: getattr(block, name)[:1]})
        with pytest.raises(ValueError, match=rf"block\.{name} must be .* at k = 2000, got"):
            encode(codec_for(5, 16), wrong)
    indices = block.indices.clone()
    indices[5] = indices[4]
    with pytest.raises(ValueError, match="block's indices must rise inside every row"):
        encode(codec_for(5, 16), dataclasses.replace(block, indices=indices))
    with pytest.raises(ValueError, match=r"block's indices must be in 0 \.\. 119, .* got 120"):
        encode(codec_for(5, 16), dataclasses.replace(block, indices=block.indices + 62))


@pytest.mark.parametrize(("written", "k"), SMALL)
def test_every_flipped_bit_is_found(written: Codec, k: int) -> None:
    payload, bucket = small_payload(written, k)
    for position in range(len(payload) * 8):
        flipped = payload.clone()
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(WireFormatError, match="payload"):
            codec.decode(flipped, bucket)
        with pytest.raises(WireFormatError, match="payload"):
            codec.read_header(flipped)


@pytest.mark.parametrize(("written", "k"), SMALL)
def test_every_cut_is_found(written: Codec, k: int) -> None:
    payload, bucket = small_payload(written, k)
    for size in range(len(payload)):
        with pytest.raises(WireFormatError, match="payload must have"):
            codec.decode(payload[:size], bucket)
    with pytest.raises(WireFormatError, match=r"payload must have .* as its header says"):
        codec.decode(torch.cat([payload, payload[:1]]), bucket)


@given(st.binary(max_size=300), st.sampled_from(list(LAYOUTS)))
def test_random_bytes_raise_one_error(data: bytes, name: str) -> None:
    with pytest.raises(WireFormatError, match="payload"):
        codec.decode(as_tensor(data), LAYOUTS[name])


@given(
    st.sampled_from(list(CODECS)),
    st.sampled_from([1, 200, 2000, 4096]),
    st.sampled_from(["one row", "short", "mixed", "all dense"]),
    st.lists(st.tuples(st.integers(4, 2**20), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_forged_payloads_raise_one_error_or_are_harmless(
    codec_id: int, k: int, name: str, changes: list[tuple[int, int]]
) -> None:
    bucket = LAYOUTS[name]
    generator = torch.Generator().manual_seed(0)
    block = select(torch.randn(bucket.numel, generator=generator), bucket, k)
    payload = encode(CODECS[codec_id], block)
    data = bytearray(payload.numpy().tobytes())
    for offset, byte in changes:
        data[offset % len(data)] = byte
    refused, forged_payload = "", resealed(data)
    try:
        header, block = codec.decode(forged_payload, bucket)
    except WireFormatError as error:
        refused = str(error)
    if refused:
        assert refused.startswith("payload")
        try:
            header = codec.read_header(forged_payload)
        except WireFormatError:
            return
        if header.codec_id in CODECS:
            assert_refused(forged_payload, bucket, re.escape(refused))
        return
    CODECS[header.codec_id].check(header, forged_payload, bucket)
    assert block.k == header.k
    assert header.signals.nonfinite or block.is_finite()
    positions = kept_positions(block)
    assert bool((positions.diff() > 0).all())
    assert not positions.numel() or (0 <= int(positions[0]) and int(positions[-1]) < bucket.numel)
    assert block.values.shape == block.indices.shape
    assert block.dense.shape == (bucket.dense_numel,)


def test_rows_may_begin_below_the_end_of_the_row_before() -> None:
    t = torch.zeros(8192)
    t[4000], t[4096 + 7] = 1.0, 1.0
    bucket = layout((2, 4096))
    arrived = codec.decode(encode(codec_for(1, 16), select(t, bucket, 1)), bucket)[1]
    assert arrived.indices.tolist() == [4000, 7]


def test_padding_must_be_zero() -> None:
    payload, bucket = small_payload(codec_for(7, 16), 7)  # 64 + 8 + 1, so 3 of padding
    data = bytearray(payload.numpy().tobytes())
    data[73] = 1
    with pytest.raises(WireFormatError, match="padding must be zeros"):
        codec.decode(resealed(data), bucket)
    data[72:74] = 0x80, 0  # an index of 7 bits in a byte
    with pytest.raises(WireFormatError, match="unused bits must be zeros"):
        codec.decode(resealed(data), bucket)


def test_another_layout_of_the_same_size_is_refused() -> None:
    payload, _ = small_payload(codec_for(7, 16), 7)
    with pytest.raises(WireFormatError, match="layout must be this rank's"):
        codec.decode(payload, layout((3,), (1, 120)))


def test_another_codecs_payload_is_refused() -> None:
    payload, bucket = small_payload(codec_for(7, 16), 7)
    with pytest.raises(WireFormatError, match=r"codec id must be 5 \(fp32\), got 6"):
        codec_for(7, 32).read_body(codec.read_header(payload), payload, bucket)
    alone = codec.encode_signals(step=1, rank=0, signals=SIGNALS)
    with pytest.raises(WireFormatError, match="payload must have a body, got signals only"):
        codec.decode(alone, bucket)
