"""The CPU's part of an exchange between two islands, in this build and in the former one.

Imports of `ds_gradprune` stand inside the contenders: a process has one build or the other.
"""

from __future__ import annotations

import importlib
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import numpy as np
import torch

WIDTH = 768
NUM_ISLANDS, RANK = 2, 0
FACTOR = 0.7
"""Weight of one island's progress: no power of two, so products are rounded."""


class Weights:
    """Own and shared weights of one island, cut into tensors, and the other island's own ones.

    Args:
        numel: about how many elements: matrices of 768 columns with a bias behind each.
    """

    def __init__(self, numel: int) -> None:
        rows = [3 * WIDTH, WIDTH, 4 * WIDTH, 4 * WIDTH]
        shapes: list[tuple[int, ...]] = []
        for count in itertools.cycle(rows):
            left = numel - sum(map(math.prod, shapes))
            if left < (WIDTH + 1) * count:
                break
            shapes += [(count, WIDTH), (count,)]
        shapes.append((max(1, left // WIDTH), WIDTH))
        self.shapes = shapes
        self.numel = sum(map(math.prod, shapes))
        rng = np.random.default_rng(0)
        shared = rng.standard_normal(self.numel, dtype=np.float32) * np.float32(0.02)
        self._starts = torch.from_numpy(shared)
        self._owns = [torch.from_numpy(shared + self._progress(rng)) for _ in range(NUM_ISLANDS)]
        self.own, self.shared = self._owns[RANK].clone(), self._starts.clone()
        self.tensors = [
            part.view(shape)
            for part, shape in zip(
                self.own.split(list(map(math.prod, shapes))), shapes, strict=True
            )
        ]

    def _progress(self, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float32]]:
        progress = rng.standard_normal(self.numel, dtype=np.float32)
        progress *= rng.standard_normal(self.numel, dtype=np.float32)
        progress *= np.float32(1e-3)
        return progress

    def reset(self, rank: int = RANK) -> None:
        """Own weights become those of an island after its steps, shared ones those before."""
        self.own.copy_(self._owns[rank])
        self.shared.copy_(self._starts)

    def crc(self) -> int:
        """Over the bits of both copies."""
        crc = 0
        for tensor in (self.own, self.shared):
            crc = google_crc32c.extend(crc, tensor.numpy().view(np.uint8))
        return int(crc)


@dataclass
class Parts:
    """Seconds of named parts of the work: CPU time of one thread, wall-clock time of more."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        start_s = clock()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + clock() - start_s


@dataclass
class Bucket:
    """What `Present` exchanges at once."""

    own: list[torch.Tensor]
    shared: torch.Tensor
    layout: Any
    payloads: list[torch.Tensor] = field(default_factory=list)


class Present:
    """The build this file belongs to.

    Args:
        weights: of the island.
        value_bits: bits of a value.
        bucket_numel: a bucket ends with the tensor that makes it so large.
    """

    def __init__(self, weights: Weights, value_bits: int, bucket_numel: int) -> None:
        self._apply = importlib.import_module("ds_gradprune.bucket.apply")
        block = importlib.import_module("ds_gradprune.bucket.block")
        self._select = importlib.import_module("ds_gradprune.bucket.select")
        self._codec = importlib.import_module("ds_gradprune.codec")
        layout = importlib.import_module("ds_gradprune.bucket.layout")
        signals = importlib.import_module("ds_gradprune.law.signals")
        self._signals = signals.RankSignals(3.0, False, 0.1, 0.01, 0.02, 100_000, 0)
        self._weights, self._value_bits = weights, value_bits
        self._scratches = [block.Scratch() for _ in range(NUM_ISLANDS)]
        self._buckets: list[Bucket] = []
        start = stop = first = 0
        for index, tensor in enumerate(weights.tensors):
            stop += tensor.numel()
            if stop - start >= bucket_numel or index == len(weights.tensors) - 1:
                own = [part.view(-1) for part in weights.tensors[first : index + 1]]
                pruned = [len(shape) > 1 for shape in weights.shapes[first : index + 1]]
                cut = layout.lay_out([part.numel() for part in own], pruned)
                self._buckets.append(Bucket(own, weights.shared[start:stop], cut))
                start, first = stop, index + 1

    def prepare(self, k: int) -> None:
        """Encode what the other island sends."""
        writer = self._codec.codec_for(k, self._value_bits)
        for bucket in self._buckets:
            size = writer.payload_bytes(bucket.layout, k)
            bucket.payloads = [torch.empty(size, dtype=torch.uint8) for _ in range(NUM_ISLANDS)]
        for rank in range(NUM_ISLANDS):
            self._weights.reset(rank)
            self._send(k, rank, Parts())

    def exchange(self, k: int) -> dict[str, float]:
        """Do the work once; seconds of every part."""
        parts, codec = Parts(), self._codec
        self._send(k, RANK, parts)
        headers = []
        with parts.part("check"):
            for bucket in self._buckets:
                headers.append([codec.read_header(payload) for payload in bucket.payloads])
                for header, payload in zip(headers[-1], bucket.payloads, strict=True):
                    codec.CODECS[header.codec_id].check(header, payload, bucket.layout)
        for bucket, heads in zip(self._buckets, headers, strict=True):
            with parts.part("decode"):
                blocks = [
                    codec.CODECS[header.codec_id].read_body(
                        header,
                        payload,
                        bucket.layout,
                        scratch.block(bucket.layout, k),
                        checked=True,
                    )
                    for header, payload, scratch in zip(
                        heads, bucket.payloads, self._scratches, strict=True
                    )
                ]
            with parts.part("apply"):
                self._apply.move_at_once(
                    bucket.own, bucket.shared, blocks, rank=RANK, factor=FACTOR
                )
        return parts.seconds

    def _send(self, k: int, rank: int, parts: Parts) -> None:
        writer = self._codec.codec_for(k, self._value_bits)
        for number, bucket in enumerate(self._buckets):
            with parts.part("select"):
                block = self._select.select(
                    bucket.own,
                    bucket.layout,
                    k,
                    plus=bucket.shared,
                    plus_scale=-1.0,
                    out=self._scratches[0].block(bucket.layout, k),
                )
                block.is_finite()
            with parts.part("encode"):
                writer.encode(
                    block,
                    step=1,
                    bucket=number,
                    rank=rank,
                    signals=self._signals,
                    out=bucket.payloads[rank],
                )


class Former:
    """The build of October 2026; as `Present`."""

    def __init__(self, weights: Weights, value_bits: int, bucket_numel: int) -> None:
        self._codec = importlib.import_module("ds_gradprune.codec")
        self._select = importlib.import_module("ds_gradprune.sparsify")
        self._flat = importlib.import_module("ds_gradprune.reducer")._flat
        records = importlib.import_module("ds_gradprune.records")
        shared = importlib.import_module("ds_gradprune.shared")
        self._signals = records.RankSignals(3.0, False, 0.1, 0.01, 0.02, 100_000, 0)
        self._weights, self._value_bits = weights, value_bits
        weights.reset()
        weights.own.copy_(weights.shared)
        self._shared = shared.SharedWeights(lambda: weights.tensors, bucket_numel)
        self._layouts = [self._select.layout_of(shapes, 1) for shapes in self._shared.shapes]
        self._peers: list[torch.Tensor] = []

    def prepare(self, k: int) -> None:
        """Encode what the other island sends."""
        self._weights.reset(1 - RANK)
        self._copy_shared()
        self._peers = [
            self._send(k, bucket, self._shared.own(bucket), 1 - RANK, Parts())[1]
            for bucket in range(len(self._layouts))
        ]

    def exchange(self, k: int) -> dict[str, float]:
        """Do the work once; seconds of every part."""
        self._copy_shared()
        parts = Parts()
        writer = self._codec.codec_for(k, self._value_bits)
        for bucket, layout in enumerate(self._layouts):
            with parts.part("select"):
                own = self._shared.own(bucket)
            block, payload = self._send(k, bucket, own, RANK, parts)
            with parts.part("decode"):
                self._codec.read_header(payload)
                header = self._codec.read_header(self._peers[bucket])
                peer = writer.read_body(header, self._peers[bucket], layout)
                sent = self._flat(block, *writer.sent_values(block))
                deliveries = [sent, self._flat(peer, peer.values, peer.dense)]
            with parts.part("apply"):
                self._shared.move(bucket, own, deliveries, RANK, FACTOR)
        seconds = parts.seconds
        self._weights.shared.copy_(
            torch.cat([self._shared.shared(bucket) for bucket in range(len(self._layouts))])
        )
        return seconds

    def _copy_shared(self) -> None:
        """The weights' shared copy to where the former build keeps it."""
        sizes = [layout.numel for layout in self._layouts]
        for bucket, part in enumerate(self._weights.shared.split(sizes)):
            self._shared.shared(bucket).copy_(part)

    def _send(
        self, k: int, bucket: int, own: torch.Tensor, rank: int, parts: Parts
    ) -> tuple[Any, torch.Tensor]:
        with parts.part("select"):
            block = self._select.select(
                own, self._layouts[bucket], k, addend=self._shared.shared(bucket), scale=-1.0
            )
        with parts.part("encode"):
            payload = self._codec.codec_for(k, self._value_bits).encode(
                block, step=1, bucket=bucket, rank=rank, signals=self._signals
            )
        return block, payload
