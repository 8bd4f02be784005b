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


class Present:
    """The build this file belongs to."""

    def __init__(self, weights: Weights, value_bits: int) -> None:
        self._apply = importlib.import_module("ds_gradprune.bucket.apply")
        block = importlib.import_module("ds_gradprune.bucket.block")
        self._select = importlib.import_module("ds_gradprune.bucket.select")
        self._codec = importlib.import_module("ds_gradprune.codec")
        layout = importlib.import_module("ds_gradprune.bucket.layout")
        signals = importlib.import_module("ds_gradprune.law.signals")
        self._signals = signals.RankSignals(3.0, False, 0.1, 0.01, 0.02, 100_000, 0)
        self._weights = weights
        self._own = [tensor.view(-1) for tensor in weights.tensors]
        self._layout = layout.lay_out(
            [tensor.numel() for tensor in self._own], [len(s) > 1 for s in weights.shapes]
        )
        self._value_bits = value_bits
        self._scratches = [block.Scratch() for _ in range(NUM_ISLANDS)]
        self._payloads: list[torch.Tensor] = []

    def prepare(self, k: int) -> None:
        """Encode what the other island sends."""
        writer = self._codec.codec_for(k, self._value_bits)
        size = writer.payload_bytes(self._layout, k)
        self._payloads = [torch.empty(size, dtype=torch.uint8) for _ in range(NUM_ISLANDS)]
        for rank in range(NUM_ISLANDS):
            self._weights.reset(rank)
            self._send(k, rank, Parts())

    def exchange(self, k: int) -> dict[str, float]:
        """Do the work once; seconds of every part."""
        parts = Parts()
        self._send(k, RANK, parts)
        codec, layout, shared = self._codec, self._layout, self._weights.shared
        with parts.part("check"):
            headers = [codec.read_header(payload) for payload in self._payloads]
            for header, payload in zip(headers, self._payloads, strict=True):
                codec.CODECS[header.codec_id].check(header, payload, layout)
        with parts.part("decode"):
            blocks = [
                codec.CODECS[header.codec_id].read_body(
                    header, payload, layout, scratch.block(layout, k), checked=True
                )
                for header, payload, scratch in zip(
                    headers, self._payloads, self._scratches, strict=True
                )
            ]
        with parts.part("apply"):
            self._apply.move_at_once(self._own, shared, blocks, rank=RANK, factor=FACTOR)
        return parts.seconds

    def _send(self, k: int, rank: int, parts: Parts) -> None:
        with parts.part("select"):
            block = self._select.select(
                self._own,
                self._layout,
                k,
                plus=self._weights.shared,
                plus_scale=-1.0,
                out=self._scratches[rank].block(self._layout, k),
            )
            block.is_finite()
        with parts.part("encode"):
            self._codec.codec_for(k, self._value_bits).encode(
                block,
                step=1,
                bucket=0,
                rank=rank,
                signals=self._signals,
                out=self._payloads[rank],
            )


class Former:
    """The build of October 2026, with one module for each of `bucket/` and `native/`."""

    def __init__(self, weights: Weights, value_bits: int) -> None:
        self._codec = importlib.import_module("ds_gradprune.codec")
        self._select = importlib.import_module("ds_gradprune.sparsify")
        self._flat = importlib.import_module("ds_gradprune.reducer")._flat
        records = importlib.import_module("ds_gradprune.records")
        shared = importlib.import_module("ds_gradprune.shared")
        self._signals = records.RankSignals(3.0, False, 0.1, 0.01, 0.02, 100_000, 0)
        self._weights, self._value_bits = weights, value_bits
        weights.reset()
        weights.own.copy_(weights.shared)
        self._shared = shared.SharedWeights(lambda: weights.tensors)
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
