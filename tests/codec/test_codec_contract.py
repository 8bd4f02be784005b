"""Every codec, one table; and arbitrary bytes, which must never do more than raise one error."""

from __future__ import annotations

import dataclasses
import math
import re
import struct

import google_crc32c
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_gradprune import codec
from ds_gradprune.bucket.block import Scratch, SparseBlock, empty_block
from ds_gradprune.bucket.layout import BucketLayout, lay_out
from ds_gradprune.bucket.select import select
from ds_gradprune.codec import CODECS, HEADER_BYTES, Codec, codec_for
from ds_gradprune.codec.places import places_bytes
from ds_gradprune.errors import WireFormatError
from ds_gradprune.law.signals import RankSignals
from tests.helpers.buckets import bits, kept_positions, layout_by_shape

pytestmark = pytest.mark.usefixtures("implementation")

SIGNALS = RankSignals(
    loss=3.5,
    nonfinite=False,
    compute_time_s=0.25,
    codec_time_s=0.125,
    comm_time_s=0.0625,
    wire_bytes=4096,
    agreement=0xDEADBEEF,
)
"""Times that float32 holds exactly."""


def layout(*shapes: tuple[int, ...]) -> BucketLayout:
    return layout_by_shape(*shapes, min_numel=100)


LAYOUTS = {
    "one row": layout((1, 4096)),
    "rows": layout((5, 4096)),
    "tail": layout((1, 5000)),
    "short": layout((3, 67)),
    "mixed": layout((2, 4096), (7,), (3, 50), (0, 9), (1, 4096), (11,), (1, 9001)),
    "all dense": layout((50,), (3, 3), (101,)),
    "empty": layout((0, 4)),
}
K = (1, 2, 41, 205, 1500, 4095, 4096)
CASES = [
    pytest.param(written, bucket, k, id=f"{written.name}-{name}-{k}")
    for written in CODECS.values()
    for name, bucket in LAYOUTS.items()
    for k in K
]
SMALL = [pytest.param(c, k, id=f"{c.name}-{k}") for c in CODECS.values() for k in (1, 200, 2000)]
"""In a row of 120: one index in plain bits, six by Elias-Fano, 59 in a bitmap."""


def encode(written: Codec, block: SparseBlock, signals: RankSignals = SIGNALS) -> torch.Tensor:
    return written.encode(block, step=12, bucket=3, rank=1, signals=signals)


def through(written: Codec, block: SparseBlock, signals: RankSignals = SIGNALS) -> SparseBlock:
    """What every receiver reads."""
    return codec.decode(encode(written, block, signals), block.layout)[1]


def assert_refused(payload: torch.Tensor, bucket: BucketLayout, message: str) -> None:
    """By `check` and by reading alike."""
    header = codec.read_header(payload)
    written = CODECS[header.codec_id]
    with pytest.raises(WireFormatError, match=message):
        written.check(header, payload, bucket)
    with pytest.raises(WireFormatError, match=message):
        written.read_body(header, payload, bucket)


def small_payload(written: Codec, k: int) -> tuple[torch.Tensor, BucketLayout]:
    """A row of 120 elements, three dense ones, padding."""
    bucket = layout((1, 120), (3,))
    return encode(written, select(torch.randn(bucket.numel), bucket, k)), bucket


# --- the contract ---------------------------------------------------------------------------------


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


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonfinite", [False, True])
@pytest.mark.parametrize("loss", [None, 0.0, -2.5, math.inf])
@pytest.mark.parametrize("compute_time_s", [None, 0.0, 0.5])
def test_signals_travel_alone_and_with_a_block(
    nonfinite: bool, loss: float | None, compute_time_s: float | None
) -> None:
    signals = dataclasses.replace(
        SIGNALS, nonfinite=nonfinite, loss=loss, compute_time_s=compute_time_s
    )
    alone = codec.encode_signals(step=9, rank=2, signals=signals)
    assert alone.shape == (HEADER_BYTES,)
    header = codec.read_header(alone)
    assert header.signals == signals
    assert (header.step, header.rank, header.bucket) == (9, 2, 0)
    assert (header.codec_id, header.numel, header.layout_crc) == (0, 0, 0)
    bucket = layout((1, 120))
    block = select(torch.zeros(120), bucket, 5)
    assert codec.read_header(encode(codec_for(5, 16), block, signals)).signals == signals


def test_signals_are_rounded_to_float32() -> None:
    signals = dataclasses.replace(
        SIGNALS, loss=1e300, compute_time_s=0.1, wire_bytes=2**24 + 1, codec_time_s=1e-60
    )
    arrived = codec.read_header(codec.encode_signals(step=1, rank=0, signals=signals)).signals
    assert arrived.loss == math.inf
    assert arrived.compute_time_s == struct.unpack("<f", struct.pack("<f", 0.1))[0]
    assert arrived.wire_bytes == 2**24
    assert arrived.codec_time_s == 0.0
    unknown = dataclasses.replace(SIGNALS, loss=math.nan)
    loss = codec.read_header(codec.encode_signals(step=1, rank=0, signals=unknown)).signals.loss
    assert loss is not None
    assert math.isnan(loss)


@pytest.mark.parametrize("k", [1, 41, 4096])
@pytest.mark.parametrize("written", [False, True])
def test_announcements_carry_k_and_whether_weights_were_written(k: int, written: bool) -> None:
    signals = dataclasses.replace(SIGNALS, written=written)
    header = codec.read_header(codec.encode_signals(step=9, rank=2, signals=signals, k=k))
    assert (header.codec_id, header.k, header.signals) == (codec.SIGNALS_ID, k, signals)
    block = select(torch.zeros(120), layout((1, 120)), 5)
    payload = encode(codec_for(5, 16), block, signals)
    assert codec.read_header(payload).signals == SIGNALS  # announcements alone carry it


@pytest.mark.parametrize("k", [0, 4097])
def test_announced_k_must_be_one(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be in 1 \.\. 4096, got {k}"):
        codec.encode_signals(step=9, rank=2, signals=SIGNALS, k=k)


# --- bad senders ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, r"step must be in 0 \.\. 2\*\*32 - 1, got -1"),
        ({"step": 2**32}, r"step must be in 0 \.\. 2\*\*32 - 1, got 4294967296"),
        ({"bucket": 65536}, r"bucket must be in 0 \.\. 2\*\*16 - 1, got 65536"),
        ({"rank": 65536}, r"rank must be in 0 \.\. 2\*\*16 - 1, got 65536"),
        ({"out": torch.empty(3, dtype=torch.uint8)}, r"out must be contiguous uint8 of shape"),
        (
            {"signals": dataclasses.replace(SIGNALS, agreement=-1)},
            r"agreement must be in 0 \.\. 2\*\*32 - 1, got -1",
        ),
        (
            {"signals": dataclasses.replace(SIGNALS, comm_time_s=math.nan)},
            r"comm_time_s must be finite and >= 0, got nan",
        ),
        (
            {"signals": dataclasses.replace(SIGNALS, wire_bytes=-1)},
            r"wire_bytes must be finite and >= 0, got -1\.0",
        ),
    ],
)
def test_what_does_not_fit_the_header_is_refused(changes: dict[str, object], message: str) -> None:
    block = select(torch.zeros(120), layout((1, 120)), 5)
    arguments = {"step": 1, "bucket": 0, "rank": 0, "signals": SIGNALS} | changes
    with pytest.raises(ValueError, match=message):
        codec_for(5, 16).encode(block, **arguments)  # type: ignore[arg-type]


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


# --- arbitrary bytes ------------------------------------------------------------------------------


def as_tensor(data: bytes | bytearray) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(
        0, dtype=torch.uint8
    )  # fmt: skip


def resealed(data: bytearray) -> torch.Tensor:
    """The same bytes with a crc that fits them, as from a faulty or foreign sender."""
    crc = google_crc32c.extend(google_crc32c.value(bytes(data[:60])), bytes(data[64:]))
    data[60:64] = struct.pack("<I", crc)
    return as_tensor(data)


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


def forged(offset: int, fmt: str, value: object) -> torch.Tensor:
    payload, _ = small_payload(codec_for(7, 16), 200)
    data = bytearray(payload.numpy().tobytes())
    struct.pack_into(fmt, data, offset, value)
    return resealed(data)


@pytest.mark.parametrize(
    ("offset", "fmt", "value", "message"),
    [
        (0, "<4s", b"GSPD", r"must begin with b'DSGP', got b'GSPD'"),
        (4, "<B", 1, r"format version must be 2, got 1\. Install the same release"),
        (5, "<B", 99, r"codec id must be one of \[0, 5, 6, 7, 8\], got 99"),
        (5, "<B", 0, "without a body must have no layout and no elements"),
        (5, "<B", 3, r"codec id must be one of \[0, 5, 6, 7, 8\], got 3"),
        (5, "<B", 5, "must have 108 bytes with codec fp32 at k = 200, got 88"),
        (6, "<H", 8, "flags must be within 0x7, got 0x8"),
        (6, "<H", 4, r"loss must be 0 when unknown, got 3\.5"),
        (6, "<H", 2, r"compute time must be 0 when unknown, got 0\.25"),
        (16, "<H", 0, r"k must be in 1 \.\. 4096, got 0"),
        (16, "<H", 4097, r"k must be in 1 \.\. 4096, got 4097"),
        (16, "<H", 4000, "must have .* bytes with codec bf16 at k = 4000, got 88"),
        (18, "<H", 1, "reserved field must be 0, got 1"),
        (20, "<I", 7, "layout must be this rank's .* crc 00000007. Do all ranks run the same"),
        (24, "<Q", 122, "layout must be this rank's .*, got 122 elements"),
        (32, "<I", 29, "must have 93 bytes, as its header says, got 88"),
        (44, "<f", math.nan, "compute time must be finite and >= 0, got nan"),
        (48, "<f", -1.0, r"codec time must be finite and >= 0, got -1\.0"),
        (52, "<f", math.inf, "comm time must be finite and >= 0, got inf"),
        (56, "<f", -math.inf, "wire bytes must be finite and >= 0, got -inf"),
    ],
)
def test_every_field_is_checked(offset: int, fmt: str, value: object, message: str) -> None:
    payload = forged(offset, fmt, value)
    with pytest.raises(WireFormatError, match=message):
        codec.decode(payload, layout((1, 120), (3,)))


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


def test_payloads_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="payload must be 1-D uint8, got 2-D"):
        codec.read_header(torch.zeros(1, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="payload must be 1-D uint8, got 1-D"):
        codec.read_header(torch.zeros(64))


def test_a_strided_payload_is_read() -> None:
    payload, bucket = small_payload(codec_for(7, 16), 7)
    strided = torch.stack([payload, payload], dim=1)[:, 0]
    assert torch.equal(
        codec.decode(strided, bucket)[1].values, codec.decode(payload, bucket)[1].values
    )
