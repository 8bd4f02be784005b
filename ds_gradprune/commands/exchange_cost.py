"""What an exchange costs on this host without its wire, through the product's own classes.

One process plays island 0. A transport that answers at once with the own payloads, under other
ranks' names, plays its peers. So the exchange is the product's from selection to commit, and only
the wire is missing; an emulated link puts it back on a clock that it moves on itself, without
waiting. All functions are local.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ds_gradprune import codec
from ds_gradprune.codec.header import parse, seal
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.law.stats import median
from ds_gradprune.train.buckets import cut
from ds_gradprune.train.islands import Islands
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.outer import make_rule, update_scale
from ds_gradprune.train.piece import Piece
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.announcement import ROW_BYTES
from ds_gradprune.wire.throttle import RatePoint, ThrottledTransport
from ds_gradprune.wire.transport import Finished, Transport, Work

SAMPLE_NUMEL = 32 * 2**20
"""The codec is measured on so many parameters at most, and its time grows with their number."""

COLD_BYTES = 64 * 2**20
"""So much memory is written before every exchange, as a step of training would do: the codec never
finds the weights in the processor's cache."""

REPEATS = 3
MOST_REPEATS, EXCHANGE_SECONDS = 15, 0.5
"""Exchanges are repeated until they have taken so long, or so often."""

# ---- payloads ------------------------------------------------------------------------------------


def payload_bytes(numels: Sequence[int], pruned: Sequence[bool], k: int, value_bits: int) -> int:
    """Bytes of one rank's payloads of one exchange, by the codec's own sizes."""
    offsets = [0, *itertools.accumulate(numels)][:-1]
    writer = codec.codec_for(k, value_bits)
    buckets = cut(numels, pruned, offsets)
    return sum(writer.payload_bytes(bucket.layout, k) for bucket in buckets)


# ---- the codec -----------------------------------------------------------------------------------


class VirtualClock:
    """Real time, plus what emulated links have slept."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.slept_s = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self._now() + self.slept_s

    def sleep(self, seconds: float) -> None:
        """Let emulated time pass."""
        self.slept_s += seconds


class Echo(Transport):
    """Peers that answer at once with what they are sent, under their own names.

    Args:
        world_size: ranks, this one included.

    Attributes:
        spent_s: what answering took, which is none of the island's own work.
    """

    rank = 0

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.spent_s = 0.0

    def start_all_gather(self, payload: torch.Tensor, out: torch.Tensor) -> Work:
        """See `Transport.start_all_gather`."""
        began = time.perf_counter()
        for rank, row in enumerate(out):
            row.copy_(payload)
            if rank:
                _rename(row, rank)
        self.spent_s += time.perf_counter() - began
        return Finished()

    def start_all_to_all(self, send: torch.Tensor, out: torch.Tensor) -> Work:
        """Not needed."""
        raise NotImplementedError

    def start_all_reduce(self, tensor: torch.Tensor) -> Work:
        """Not needed."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to do."""


def _rename(row: torch.Tensor, rank: int) -> None:
    """Put another sender into the headers of all payloads of a message."""
    if row.numel() == ROW_BYTES:
        row = row[: codec.HEADER_BYTES]  # the announcement has a tail
    data, start = row.numpy(), 0
    while start < row.numel():
        body_bytes = int.from_bytes(data[start + 32 : start + 36].tobytes(), "little")
        stop = start + codec.HEADER_BYTES + body_bytes
        header = parse(row[start:stop])
        seal(dataclasses.replace(header, rank=rank), data[start:stop])
        start = stop


class _Pieces:
    """Random weights, as the shards of an island."""

    has_masters = False
    warmup_fault = None

    def __init__(
        self, numels: Sequence[int], pruned: Sequence[bool], device: str | torch.device
    ) -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        self._pieces = [
            Piece(i, str(i), torch.randn(n, generator=generator, device=device), is_pruned)
            for i, (n, is_pruned) in enumerate(zip(numels, pruned, strict=True))
        ]

    def pieces(self) -> list[Piece]:
        return self._pieces

    every_piece = pieces

    def publish(self) -> None:
        pass


@dataclasses.dataclass(frozen=True, slots=True)
class Exchanged:
    """What one density costs.

    Attributes:
        codec_s: select, encode, decode, apply; of the whole model.
        emulated_s: wire of the sample on every emulated link, announcement included.
    """

    codec_s: float
    emulated_s: tuple[float, ...]


def measure_exchange(
    numels: Sequence[int],
    pruned: Sequence[bool],
    *,
    k: int,
    islands: int,
    value_bits: int,
    decay: float | None,
    points: Sequence[RatePoint] = (),
    device: str = "cpu",
) -> Exchanged:
    """Exchange random progress a few times.

    Args:
        numels: elements of every parameter.
        pruned: whether they are selected.
        k: kept elements per chunk.
        islands: how many exchange.
        value_bits: of a value on the wire.
        decay: of a residual that is kept aside; None: it stays in the own weights.
        points: emulated links, their steps 1, 2, ...; as many exchanges are made at least.
        device: where the weights lie.
    """
    clock, echo = VirtualClock(), Echo(islands)
    transport: Transport = echo
    if points:
        first = [dataclasses.replace(points[0], step=0)]
        transport = ThrottledTransport(
            echo, [*first, *points], timeout_s=1e9, sleep=clock.sleep, clock=clock
        )
    shards: Any = _Pieces(numels, pruned, device)
    exchanger = Islands(
        SharedWeights(shards),
        AllGather(transport),
        Stopwatch(clock),
        value_bits=value_bits,
        scale=update_scale(islands, None),
        rule=make_rule(0.0, 1),
        kept=None if decay is None else KeptResidual(decay),
    )
    cold = torch.zeros(COLD_BYTES, dtype=torch.uint8)
    _exchange(exchanger, shards, cold, k, 0)
    times_s, wires_s = list[float](), list[float]()
    for step in range(1, MOST_REPEATS + 1):
        if step > max(REPEATS, len(points)) and sum(times_s) > EXCHANGE_SECONDS:
            break
        transport.advance(step)
        slept_s, echo.spent_s = clock.slept_s, 0.0
        took_s = _exchange(exchanger, shards, cold, k, step) - echo.spent_s
        wires_s.append(clock.slept_s - slept_s)
        times_s.append(took_s)
    return Exchanged(median(times_s), tuple(wires_s[: len(points)]))


def _exchange(exchanger: Islands, shards: _Pieces, cold: torch.Tensor, k: int, step: int) -> float:
    """One exchange; returns its real seconds, answers of the peers included."""
    generator = torch.Generator(device=shards.pieces()[0].own.device).manual_seed(step)
    for piece in shards.pieces():
        noise = torch.randn(piece.own.shape, generator=generator, device=piece.own.device)
        piece.own.add_(noise, alpha=1e-3)
    cold.add_(1)
    synchronize(shards.pieces()[0].own.device)
    signals = RankSignals(1.0, False, 0.1, 0.0, 0.0, 0, 0)
    header = codec.encode_signals(step=step, rank=0, k=k, signals=signals)
    began = time.perf_counter()
    prepared = exchanger.prepare(k, step=step, signals=signals)
    announcement = exchanger.channel.announce(header, prepared.sizes)
    prepared.write()
    announcement.headers()
    prepared.start()
    prepared.deliver()
    prepared.commit()
    synchronize(shards.pieces()[0].own.device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for what was started on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
