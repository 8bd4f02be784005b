"""The accelerator's part of an exchange, beside a copy and beside plain torch operations.

Every kernel is timed with CUDA events, alone, after a write that empties the L2 cache: medians. Its
bytes are those that it must read and write; scattered ones count as the 32-byte sectors they lie
in. The unit is a copy of 8 bytes per element in the same run. Before anything is timed, results on
fresh random numbers are compared with the CPU's, bit for bit: several whole tensors of each size.

    python -m labs.kernels --device cuda [--numel 100000000 1000000000] [--density 0.01 0.05]
        [--value-bits 2] [--rounds 5] [--seconds 40] [--variants]

Longer than 300 lines: one timing and one check per kernel, over the same vectors.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ds_gradprune import codec
from ds_gradprune.bucket import device as tables_on
from ds_gradprune.bucket.apply import Move, move_at_once, scatter_add
from ds_gradprune.bucket.block import SparseBlock, empty_block
from ds_gradprune.bucket.layout import CHUNK_NUMEL, BucketLayout, lay_out
from ds_gradprune.bucket.select import select
from ds_gradprune.codec import device as bodies
from ds_gradprune.codec.header import HEADER_BYTES
from ds_gradprune.law.signals import RankSignals

MATRIX, BIAS = 4096 * 4096, 4096
MOVE = "move of 2 at once"
FACTOR = 0.7
"""Weight of one island's progress: no power of two, so products are rounded."""
SIGNALS = RankSignals(3.0, False, 0.1, 0.01, 0.02, 100_000, 0)
BASELINE_NUMEL = 100_000_000
"""Plain torch operations are timed up to here."""
BYTES_PER_ELEMENT = 24
"""Device memory a cell takes at most: four vectors, a byte map, blocks, payloads."""
BASELINE = ("select own - shared", MOVE, "scatter_add")
FLUSH_BYTES = 1 << 28
VARIANTS = [
    (warps, limit, rows)
    for warps, limit in ((2, None), (2, 128), (4, None), (4, 80), (8, 64))
    for rows in (8, 32)
]
"""Warps, registers and rows of a program of the selection, for `--variants`."""


def layout_of(numel: int) -> BucketLayout:
    """Matrices with a bias behind each, the last one smaller; whole chunks."""
    sizes: list[int] = []
    numel -= numel % CHUNK_NUMEL
    while (left := numel - sum(sizes)) > 0:
        sizes += [min(left, MATRIX)]
        if left > MATRIX + BIAS:
            sizes += [BIAS]
    return lay_out(sizes, [size != BIAS for size in sizes])


@contextmanager
def plain_torch() -> Iterator[None]:
    """Without the Triton kernels."""
    before = os.environ.get("DS_GRADPRUNE_TRITON")
    os.environ["DS_GRADPRUNE_TRITON"] = "0"
    try:
        yield
    finally:
        del os.environ["DS_GRADPRUNE_TRITON"]
        if before is not None:
            os.environ["DS_GRADPRUNE_TRITON"] = before


class Clock:
    """Median seconds of work on the device.

    Args:
        rounds: timed ones; one more warms up.
    """

    def __init__(self, rounds: int, device: torch.device) -> None:
        self._rounds = rounds
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, work: Callable[[], object]) -> float:
        """Of one call."""
        work()
        pairs = []
        for _ in range(self._rounds):
            self._flush.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            stop.record()
            pairs.append((start, stop))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in pairs) / 1e3


class Island:
    """Own and shared weights, a gradient and a residual of one size, all random.

    Args:
        numel: elements of each.
        device: where they lie.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        self.layout = layout_of(numel)
        self._alone: dict[int, BucketLayout] = {}
        numel = self.layout.numel
        self.device = device
        rng = torch.Generator(device).manual_seed(time.time_ns() % 2**31)
        self.vector, self.residual, self.shared, self.flat = (
            torch.empty(numel, device=device).normal_(generator=rng) for _ in range(4)
        )
        self.residual *= 0.5
        self.sizes = [segment.numel for segment in self.layout.segments]
        self.own = list(self.flat.split(self.sizes))

    def segments(self) -> list[int]:
        """Numbers of the segments that are compared: matrices at both ends, one bias."""
        pruned = [n for n, s in enumerate(self.layout.segments) if s.pruned]
        dense = [n for n, s in enumerate(self.layout.segments) if not s.pruned]
        return sorted({pruned[0], pruned[-1], *dense[-1:]})

    def part(self, block: SparseBlock, number: int) -> SparseBlock:
        """One segment of a block, on the CPU, as a block of its own."""
        layout, segment = self.layout, self.layout.segments[number]
        alone = self._alone.setdefault(number, lay_out([segment.numel], [segment.pruned]))
        runs = [run for run in layout.runs(block.k) if run.segment == number]
        kept = slice(runs[0].kept_start, runs[-1].kept_stop) if runs else slice(0)
        filled = sum(s.numel for s in layout.segments[:number] if not s.pruned)
        dense = slice(filled, filled + (0 if segment.pruned else segment.numel))
        parts = (block.indices[kept], block.values[kept], block.dense[dense])
        return SparseBlock(alone, block.k, *(t.cpu() for t in parts))

    def cut(self, vector: torch.Tensor, number: int) -> torch.Tensor:
        """One segment of a vector, on the CPU."""
        segment = self.layout.segments[number]
        return vector[segment.offset : segment.offset + segment.numel].cpu()


def same(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Stop unless all is finite and the bits are equal."""
    if got.is_floating_point():
        if not bool(torch.isfinite(expected).all()):
            raise SystemExit(f"{what} must be finite on the CPU")
        got, expected = got.view(torch.int32), expected.view(torch.int32)
    if got.shape != expected.shape or not torch.equal(got, expected):
        raise SystemExit(f"{what} must have the CPU's bits")


def same_block(what: str, got: SparseBlock, expected: SparseBlock) -> None:
    """`same` for all of a block."""
    for name in ("indices", "values", "dense"):
        same(f"{what} {name}", getattr(got, name), getattr(expected, name))


def check(island: Island, k: int, bits: int) -> None:
    """Compare selection, coding and moves with the CPU's on some segments."""
    layout, device = island.layout, island.device
    for vector in (island.vector, island.vector.bfloat16()):
        for residual in (None, island.residual):
            block = select(vector, layout, k, plus=residual)
            for number in island.segments():
                part = island.part(block, number)
                plus = None if residual is None else island.cut(residual, number)
                expected = select(island.cut(vector, number), part.layout, k, plus=plus)
                same_block(f"select {vector.dtype} at k = {k}", part, expected)
    blocks = [select(v, layout, k) for v in (island.vector, island.residual)]
    writer = codec.codec_for(k, bits)
    read = []
    for block in blocks:
        stamp: dict[str, Any] = {"step": 1, "bucket": 0, "rank": 0, "signals": SIGNALS}
        payload = writer.encode(block, **stamp)
        there = (t.cpu() for t in (block.indices, block.values, block.dense))
        same("payload", payload, writer.encode(SparseBlock(layout, k, *there), **stamp))
        header = codec.read_header(payload)
        writer.check(header, payload, layout)
        back = writer.read_body(header, payload, layout, empty_block(layout, k, device), True)
        on_cpu = writer.read_body(header, payload, layout, checked=True)
        there = (t.cpu() for t in (back.indices, back.values, back.dense))
        same_block("decode", SparseBlock(layout, k, *there), on_cpu)
        read.append(back)
    for at_once in (True, False):
        before = [(island.cut(island.flat, n), island.cut(island.shared, n)) for n in
                  island.segments()]  # fmt: skip
        move(island, read, at_once)
        for number, (own, shared) in zip(island.segments(), before, strict=True):
            parts = [island.part(block, number) for block in read]
            move_at_once([own], shared, parts, rank=0, factor=FACTOR)
            same(f"own weights at k = {k}", island.cut(island.flat, number), own)
            same(f"shared weights at k = {k}", island.cut(island.shared, number), shared)


def move(island: Island, blocks: list[SparseBlock], at_once: bool) -> None:
    """Apply both islands' blocks, with all in memory or one after the other."""
    if at_once:
        move_at_once(island.own, island.shared, blocks, rank=0, factor=FACTOR)
        return
    stream = Move(island.own, island.shared, island.layout)
    for number, block in enumerate(blocks):
        stream.add(block, FACTOR, is_own=number == 0)
    stream.close()


def sectors(island: Island, blocks: list[SparseBlock]) -> int:
    """How many runs of 8 elements hold one that some block lists."""
    layout, device = island.layout, island.device
    found = torch.zeros(layout.numel // 8 + 1, dtype=torch.bool, device=device)
    for block in blocks:
        for run in layout.runs(block.k):
            rows = torch.arange(run.num_rows, device=device) * run.row_numel + run.bucket_start
            kept = block.indices[run.kept_start : run.kept_stop].view(run.num_rows, -1)
            found[((rows[:, None] + kept) // 8).view(-1)] = True
    for start, numel in layout.dense_runs:
        found[start // 8 : (start + numel) // 8] = True
    return int(found.sum())


def cells_of(
    island: Island, density: float, bits: int, clock: Clock, copy_bytes_per_s: float
) -> list[dict[str, Any]]:
    """Every kernel at one density."""
    layout, device, numel = island.layout, island.device, island.layout.numel
    k = max(1, math.ceil(density * CHUNK_NUMEL))
    check(island, k, bits)
    halves = island.vector.bfloat16()
    blocks = [select(v, layout, k) for v in (island.vector, island.residual)]
    writer = codec.codec_for(k, bits)
    formats = writer.values, writer.dense
    cuts, size = (HEADER_BYTES, *writer._cuts(layout, k)), writer.payload_bytes(layout, k)
    payload = bodies.write_body(blocks[0], formats, cuts, size)
    out = empty_block(layout, k, device)
    block_bytes = 6 * layout.num_kept(k) + 4 * layout.dense_numel
    weights_bytes = 4 * 32 * sectors(island, blocks)  # own and shared, read and written
    one_bytes = 2 * 32 * sectors(island, blocks[:1])
    vector, residual, shared = island.vector, island.residual, island.shared
    todo: list[tuple[str, int, Callable[[], object]]] = [
        ("select fp32", 4 * numel + block_bytes, lambda: select(vector, layout, k, out=out)),
        ("select fp32 + residual", 8 * numel + block_bytes,
         lambda: select(vector, layout, k, plus=residual, out=out)),
        ("select bf16", 2 * numel + block_bytes, lambda: select(halves, layout, k, out=out)),
        ("select bf16 + residual", 6 * numel + block_bytes,
         lambda: select(halves, layout, k, plus=residual, out=out)),
        ("select own - shared", 8 * numel + block_bytes,
         lambda: select(island.own, layout, k, plus=shared, plus_scale=-1.0, out=out)),
        ("encode", block_bytes + size, lambda: bodies.write_body(blocks[0], formats, cuts, size)),
        ("decode", block_bytes + size, lambda: bodies.read_body(payload, formats, cuts, out)),
        (MOVE, 2 * block_bytes + weights_bytes, lambda: move(island, blocks, True)),
        ("move of 2 in a stream", 2 * block_bytes + weights_bytes,
         lambda: move(island, blocks, False)),
        ("scatter_add", block_bytes + one_bytes,
         lambda: scatter_add(shared, blocks[0], 1e-3)),
    ]  # fmt: skip
    found = []
    for name, nbytes, work in todo:
        second = clock(work)
        cell = {
            "kernel": name, "numel": numel, "density": density, "bytes": nbytes, "s": second,
            "gbytes_per_s": nbytes / second / 1e9,
            "fraction_of_copy": nbytes / second / copy_bytes_per_s,
        }  # fmt: skip
        if numel <= BASELINE_NUMEL and name in BASELINE:
            with plain_torch():
                cell["torch_s"] = clock(work)
        found.append(cell)
        show(cell)
    return found


def variants_of(island: Island, clock: Clock) -> list[dict[str, Any]]:
    """The selection with other shapes of programs, with a residual, at 1 % and 5 %."""
    from ds_gradprune.native.device import select as kernel

    layout, device, found = island.layout, island.device, []
    terms = [(island.residual, 1.0)]
    for k in (41, 205):
        out = empty_block(layout, k, device)
        rows, starts = tables_on.pruned(layout, k, device)[0]
        for dtype in (torch.float32, torch.bfloat16):
            source = tables_on.source([island.vector.to(dtype)], terms, layout, whole=True)
            for warps, limit, per_program in VARIANTS:
                if dtype is torch.bfloat16 and k == 41:
                    continue
                work = functools.partial(
                    kernel.select, source, rows, starts, k, out.indices, out.values,
                    num_warps=warps, max_registers=limit, rows_per_program=per_program,
                )  # fmt: skip
                found.append({
                    "warps": warps, "registers": limit, "rows": per_program, "k": k,
                    "dtype": str(dtype), "s": clock(work),
                })  # fmt: skip
                print(found[-1], flush=True)
    return found


def show(cell: dict[str, Any]) -> None:
    """One cell as a line."""
    line = (
        f"{cell['numel'] / 1e6:6.0f} M  density {cell['density']:<5} {cell['kernel']:<24} "
        f"{1e3 * cell['s']:8.3f} ms  {cell['gbytes_per_s']:6.0f} GB/s  "
        f"{cell['fraction_of_copy']:.3f} of a copy"
    )
    if "torch_s" in cell:
        line += f"  (torch {1e3 * cell['torch_s']:.3f} ms)"
    print(line, flush=True)


def exchanges(cells: list[dict[str, Any]]) -> list[float]:
    """Bytes over time of one island's part of an exchange of two, in copies: one per cell.

    It selects from own - shared, encodes, decodes two payloads and moves both copies.
    """
    found = []
    for numel, density in dict.fromkeys((c["numel"], c["density"]) for c in cells):
        here = {c["kernel"]: c for c in cells if (c["numel"], c["density"]) == (numel, density)}
        parts = [here[n] for n in ("select own - shared", "encode", *2 * ("decode",), MOVE)]
        copy_bytes_per_s = parts[0]["gbytes_per_s"] / parts[0]["fraction_of_copy"] * 1e9
        seconds = sum(part["s"] for part in parts)
        found.append(sum(part["bytes"] for part in parts) / seconds / copy_bytes_per_s)
        print(f"{numel / 1e6:.0f} M at {density}: exchange {found[-1]:.3f} of a copy", flush=True)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All sizes that fit.

    Returns:
        What the JSON document gains: `gpu_fraction_of_copy`, the worst of `exchanges`, the worst
        of every kernel, and a table of all cells.
    """
    start_s = time.perf_counter()
    device = torch.device("cuda", torch.cuda.current_device())
    clock = Clock(options.rounds, device)
    cells: list[dict[str, Any]] = []
    copies: list[dict[str, Any]] = []
    variants: list[dict[str, Any]] = []
    for numel in options.numel:
        free, _ = torch.cuda.mem_get_info(device)
        if numel * BYTES_PER_ELEMENT > free - (4 << 30):
            print(f"{numel} elements do not fit into {free / 1e9:.0f} GB", flush=True)
            continue
        island = Island(numel, device)
        second = clock(functools.partial(island.flat.copy_, island.vector))
        island.flat.normal_()
        copies.append(
            {"numel": numel, "s": second, "gbytes_per_s": 8 * island.layout.numel / second / 1e9}
        )
        print(f"copy of {numel}: {copies[-1]['gbytes_per_s']:.0f} GB/s", flush=True)
        for density in options.density:
            if time.perf_counter() - start_s > options.seconds:
                print(f"no time left for {numel} at density {density}", flush=True)
                continue
            cells += cells_of(
                island, density, options.value_bits, clock, 8 * island.layout.numel / second
            )
        if options.variants and numel <= BASELINE_NUMEL:
            variants += variants_of(island, clock)
        del island
        torch.cuda.empty_cache()
    return {
        "gpu_fraction_of_copy": min(exchanges(cells), default=None),
        "gpu_fraction_by_kernel": {
            name: min(c["fraction_of_copy"] for c in cells if c["kernel"] == name)
            for name in dict.fromkeys(c["kernel"] for c in cells)
        },
        "gpu": torch.cuda.get_device_name(device),
        "gpu_copies": copies,
        "gpu_cells": cells,
        "gpu_variants": variants,
        "gpu_wall_s": time.perf_counter() - start_s,
    }
