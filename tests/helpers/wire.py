"""Headers, messages and exchanges for tests of the wire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ds_gradprune import codec
from ds_gradprune.bucket.apply import scatter_add
from ds_gradprune.bucket.block import empty_block
from ds_gradprune.bucket.layout import BucketLayout, lay_out
from ds_gradprune.bucket.select import select
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.wire.channel import Channel, Pending

SIGNALS = RankSignals(1.5, False, 0.1, 0.2, 0.3, 400, 7)


def announcement_of(rank: int, *, step: int = 3, k: int = 41, **signals: Any) -> torch.Tensor:
    """A header without a body."""
    told = {name: getattr(SIGNALS, name) for name in RankSignals.__dataclass_fields__} | signals
    return codec.encode_signals(step=step, rank=rank, k=k, signals=RankSignals(**told))


def filled(rank: int, sizes: list[int]) -> torch.Tensor:
    """A message whose payload b of rank r holds 10 * r + b everywhere."""
    parts = [torch.full((n,), 10 * rank + b, dtype=torch.uint8) for b, n in enumerate(sizes)]
    return torch.cat([torch.empty(0, dtype=torch.uint8), *parts])


# --- exchanges, as a caller makes them that knows shares only -------------------------------------

LAYOUTS = [
    lay_out([5 * 4096 + 100, 40, 3 * 4096, 61], [True, False, True, False]),
    lay_out([70], [True]),  # fewer rows than owners
    lay_out([9], [False]),
]


def vector_of(rank: int, bucket: int, step: int) -> torch.Tensor:
    """What a rank puts in, on a grid so coarse that fp32 sums of it are exact."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + bucket)
    numel = LAYOUTS[bucket].numel
    return torch.randint(-500, 500, (numel,), generator=generator).float() / 16


def begin(
    channel: Channel,
    vectors: Sequence[torch.Tensor],
    k: int = 205,
    value_bits: int = 32,
    layouts: Sequence[BucketLayout] = LAYOUTS,
    **header: Any,
) -> Pending:
    """Select, encode and start."""
    writer = codec.codec_for(k, value_bits)
    told = {"step": 1, "rank": channel.rank, "signals": SIGNALS} | header
    payloads = []
    for bucket, (vector, layout) in enumerate(zip(vectors, layouts, strict=True)):
        block = select(vector, layout, k)
        payloads += [
            writer.encode(share.of(block), **({"bucket": bucket} | told))
            for share in channel.shares(layout)
        ]
    return channel.start(torch.cat(payloads), [p.numel() for p in payloads], layouts)


def add_up(
    channel: Channel, payloads: Sequence[torch.Tensor], layout: BucketLayout
) -> torch.Tensor:
    """The sum of all deliveries of a bucket."""
    total = torch.zeros(layout.numel)
    shares = channel.shares(layout)
    for first in range(0, len(payloads), len(shares)):
        together = payloads[first : first + len(shares)]
        block = empty_block(layout, codec.read_header(together[0]).k)
        for share, payload in zip(shares, together, strict=True):
            header = codec.read_header(payload)
            reader = codec.CODECS[header.codec_id]
            reader.check(header, payload, share.layout)
            reader.read_body(header, payload, share.layout, out=share.of(block), checked=True)
        scatter_add(total, block)
    return total


def exchanged(channel: Channel, vectors: Sequence[torch.Tensor], **options: Any) -> Any:
    """One exchange: what was delivered and what left this rank, of every bucket."""
    pending = begin(channel, vectors, **options)
    pending.wait()
    results = [
        (add_up(channel, pending.payloads(b), layout), add_up(channel, pending.sent(b), layout))
        for b, layout in enumerate(LAYOUTS)
    ]
    pending.finish(applied=True)
    return results
