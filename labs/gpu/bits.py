"""One process: what the machine is, and the same bits on its device as on its CPU.

Without a GPU the device's side is played by the torch references on the CPU, which is what runs on
accelerators.

Longer than 300 lines: one comparison per kernel, over the same random data.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import google_crc32c
import torch

from ds_gradprune import codec
from ds_gradprune.bucket import apply as applies
from ds_gradprune.bucket import select as selects
from ds_gradprune.bucket.block import SparseBlock, empty_block
from ds_gradprune.bucket.layout import BucketLayout, lay_out
from ds_gradprune.law.signals import RankSignals
from ds_gradprune.native import library
from ds_gradprune.train.islands import Islands
from ds_gradprune.train.kept import KeptResidual
from ds_gradprune.train.outer import make_rule
from ds_gradprune.train.piece import Piece
from ds_gradprune.train.shared_weights import SharedWeights
from ds_gradprune.train.stopwatch import Stopwatch
from ds_gradprune.wire.all_gather import AllGather
from ds_gradprune.wire.loopback import LoopbackHub
from labs.gpu.engines import device, synchronize

NUMELS, PRUNED = [768 * 768, 768, 3 * 1500, 4096 * 40 + 17, 5], [True, False, True, True, False]
SIGNALS = RankSignals(1.0, False, 0.1, 0.0, 0.0, 0, 0)


# ---- the machine ---------------------------------------------------------------------------------


def machine(size_bytes: int) -> dict[str, Any]:
    """Versions, the device, and what its memory and its bus can do."""
    began_s = time.perf_counter()
    built = library.kernels() is not None
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "device": str(device()),
        "kernels_ready_s": time.perf_counter() - began_s,
    }
    where = device()
    if where.type == "cuda":
        found["name"] = torch.cuda.get_device_name(0)
        found["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    source = torch.randn(size_bytes // 4, device=where)
    target = torch.empty_like(source)
    host = torch.empty(size_bytes // 4, pin_memory=where.type == "cuda")
    plain = torch.empty(size_bytes // 4).fill_(1.0)
    found["bytes_per_s"] = {
        "device to device, read and written": 2 * size_bytes / _fastest(target.copy_, source),
        "device to pinned host": size_bytes / _fastest(host.copy_, source),
        "device to host": size_bytes / _fastest(plain.copy_, source),
        "pinned host to device": size_bytes / _fastest(target.copy_, host),
        "host to device": size_bytes / _fastest(target.copy_, plain),
    }
    return found | {"checks": {"native kernels are built": built}}


def _fastest(call: Any, *args: Any) -> float:
    seconds = []
    for _ in range(4):
        synchronize()
        began_s = time.perf_counter()
        call(*args)
        synchronize()
        seconds.append(time.perf_counter() - began_s)
    return min(seconds)


# ---- bit for bit ---------------------------------------------------------------------------------


@contextlib.contextmanager
def on_device() -> Iterator[torch.device]:
    """Where accelerators compute."""
    if device().type == "cuda":
        yield device()
        return
    with (
        mock.patch.object(selects, "kernels_on", return_value=None),
        mock.patch.object(applies, "kernels_on", return_value=None),
    ):
        yield device()


def _numbers(layout: BucketLayout, seed: int) -> torch.Tensor:
    """Heavy tails, equal magnitudes, zeros of both signs, and numbers below the normal ones."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(layout.numel, generator=generator)
    t *= torch.randn(layout.numel, generator=generator)
    t[::7] = t[::7].sign() * 0.5
    t[3::11] = 0.0
    t[5::13] *= -0.0
    t[2::17] *= 1e-42
    return t


def selected() -> dict[str, Any]:
    """`select`, then `encode` and `read_body`, on the device and on the CPU."""
    layout = lay_out(NUMELS, PRUNED)
    checks: dict[str, bool] = {}
    for k, dtype in itertools.product((1, 41, 205, 1024, 4096), ("float32", "bfloat16", "float16")):
        vector = _numbers(layout, 1).to(getattr(torch, dtype))
        if k == 41:
            vector[100], vector[5000], vector[9000] = torch.inf, torch.nan, -torch.inf
        plus, more = _numbers(layout, 2), _numbers(layout, 3)
        scales = {"plus_scale": -1.0, "more_scale": 0.95}
        here = selects.select(vector, layout, k, plus=plus, more=more, **scales)
        with on_device() as where:
            terms = {"plus": plus.to(where), "more": more.to(where)}
            there = selects.select(vector.to(where), layout, k, **terms, **scales)
        checks[f"select k {k} {dtype}"] = _equal(here, there)
        if dtype == "float32" and k != 41:
            for bits in (2, 4, 16, 32):
                checks[f"codec {bits} bit k {k}"] = _same_payload(layout, k, bits, here, there)
    return {"checks": checks}


def _same_payload(
    layout: BucketLayout, k: int, bits: int, here: SparseBlock, there: SparseBlock
) -> bool:
    writer = codec.codec_for(k, bits)
    told: dict[str, Any] = {"step": 1, "bucket": 0, "rank": 0, "signals": SIGNALS}
    one, other = writer.encode(here, **told), writer.encode(there, **told)
    header = codec.read_header(one)
    reader = codec.CODECS[header.codec_id]
    block = reader.read_body(header, one, layout)
    on_it = reader.read_body(header, one, layout, out=empty_block(layout, k, there.device))
    return torch.equal(one, other) and _equal(block, on_it)


def _equal(one: SparseBlock, other: SparseBlock) -> bool:
    return all(
        _same_bits(getattr(one, name), getattr(other, name))
        for name in ("indices", "values", "dense")
    )


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same bits; nan is nan: processors differ in the bits of one that they compute."""
    one, other = one.cpu(), other.cpu()
    nan = one != one
    if not torch.equal(nan, other != other):
        return False
    pair = (t.masked_fill(nan, 0).view(torch.int16) for t in (one, other))
    return torch.equal(*pair)


def moved() -> dict[str, Any]:
    """`Move`, `move_at_once` and `scatter_add` on the device and on the CPU."""
    layout = lay_out(NUMELS, PRUNED)
    checks: dict[str, bool] = {}
    for k in (1, 41, 1024):
        sent = [selects.select(_numbers(layout, 10 + rank), layout, k) for rank in range(3)]
        own, shared = _numbers(layout, 20), _numbers(layout, 21)
        for name in ("move", "at once", "add", "add bfloat16"):
            here = _apply(name, own, shared, sent, layout)
            with on_device() as where:
                blocks = [
                    SparseBlock(layout, k, *(t.to(where) for t in (b.indices, b.values, b.dense)))
                    for b in sent
                ]
                there = _apply(name, own.to(where), shared.to(where), blocks, layout)
            pairs = zip(here, there, strict=True)
            checks[f"{name} k {k}"] = all(_same_bits(one, other) for one, other in pairs)
    return {"checks": checks}


def _apply(
    name: str,
    own: torch.Tensor,
    shared: torch.Tensor,
    blocks: list[SparseBlock],
    layout: BucketLayout,
) -> list[torch.Tensor]:
    parts, shared = [part.clone() for part in own.split(NUMELS)], shared.clone()
    if name == "at once":
        applies.move_at_once(parts, shared, blocks, rank=1, factor=0.7)
    elif name == "move":
        move = applies.Move(parts, shared, layout)
        for number, block in enumerate(blocks):
            move.add(block, 0.7, is_own=number == 1)
        move.close()
    else:
        shared = shared.bfloat16() if name.endswith("bfloat16") else shared
        for block in blocks:
            applies.scatter_add(shared, block, 0.7)
    return [*parts, shared]


# ---- whole exchanges -----------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "used": {},
    "reset": {"decay": 0.95},
    "momentum": {"momentum": 1.0},
    "shared on the CPU": {"on_cpu": True},
    "shared on the CPU, reset, momentum": {"on_cpu": True, "decay": 0.95, "momentum": 1.0},
}


class _Weights:
    """Random weights as the shards of an island, equal on all islands at first."""

    has_masters = True
    warmup_fault = None

    def __init__(self, where: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._pieces = [
            Piece(i, str(i), torch.randn(n, generator=generator).to(where), pruned)
            for i, (n, pruned) in enumerate(zip(NUMELS, PRUNED, strict=True))
        ]

    def pieces(self) -> list[Piece]:
        return self._pieces

    every_piece = pieces


def exchanged() -> dict[str, Any]:
    """Three exchanges of two islands (threads) on the device and on the CPU, in every way."""
    checks: dict[str, bool] = {}
    for name, way in WAYS.items():
        here = _exchanges(torch.device("cpu"), **way)
        with on_device() as where:
            there = _exchanges(where, **way)
        checks[f"equal to the CPU: {name}"] = here == there
        checks[f"equal on both islands: {name}"] = there[0][0] == there[1][0]
    return {"checks": checks}


def _exchanges(
    where: torch.device, decay: float | None = None, momentum: float = 0.0, on_cpu: bool = False
) -> list[tuple[int, int]]:
    hub = LoopbackHub(2)
    ends: list[tuple[int, int]] = [(0, 0), (0, 0)]
    faults: list[Exception] = []

    def island(rank: int) -> None:
        try:
            ends[rank] = _island(hub.transport(rank), where, decay, momentum, on_cpu)
        except Exception as exc:
            faults.append(exc)
            hub.abort()

    threads = [threading.Thread(target=island, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return ends


def _island(
    transport: Any, where: torch.device, decay: float | None, momentum: float, on_cpu: bool
) -> tuple[int, int]:
    shards: Any = _Weights(where)
    islands = Islands(
        SharedWeights(shards, 300_000, on_cpu=on_cpu),
        AllGather(transport),
        Stopwatch(time.perf_counter),
        value_bits=4,
        scale=1.4,
        rule=make_rule(momentum, 1),
        kept=None if decay is None else KeptResidual(decay),
    )
    for number in range(3):
        generator = torch.Generator().manual_seed(10 * number + transport.rank)
        for piece in shards.pieces():
            piece.own.add_(torch.randn(piece.own.shape, generator=generator).to(where), alpha=1e-3)
        header = codec.encode_signals(step=number, rank=transport.rank, k=41, signals=SIGNALS)
        prepared = islands.prepare(41, step=number, signals=SIGNALS)
        announcement = islands.channel.announce(header, prepared.sizes)
        prepared.write()
        announcement.headers()
        prepared.start()
        prepared.deliver()
        prepared.commit()
    own = 0
    for piece in shards.pieces():
        own = google_crc32c.extend(own, piece.own.cpu().numpy().tobytes())
    return islands.weights.crc(), int(own)
