"""Selection, encoding and decoding of one GPT-shaped bucket on a CPU, and what a payload costs.

What limits the quantity: selection must read the gradient and the residual once, 8 bytes an element
at float32, so a copy of the vector (4 read, 4 written) is its roofline; encoding and decoding touch
only what is kept. The contender in the same run, in turn with the others, is the obvious way:
`torch.topk` over every row of the sum. Medians after warm-up. A second table has the size of a
payload for every width of values. (labs/kernels.py times a whole exchange between islands.)

    python labs/codec.py [--numel 3300000] [--density 0.05] [--world-size 2] [--value-bits 16]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # The root instead of this folder: labs and ds_gradprune are found there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from ds_gradprune import codec
from ds_gradprune.bucket.apply import scatter_add
from ds_gradprune.bucket.block import empty_block
from ds_gradprune.bucket.layout import CHUNK_NUMEL, BucketLayout, kept_per_chunk, lay_out
from ds_gradprune.bucket.select import select
from ds_gradprune.codec.places import places_bytes
from ds_gradprune.law.signals import RankSignals
from labs.machine import commit, machine

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = RankSignals(3.0, False, 0.1, 0.01, 0.02, 100_000, 0)
MIN_NUMEL = 4096
LAYERS = 6
SIZES_AT_K = (4, 41, 205, 1024)


def gpt_layout(numel: int) -> BucketLayout:
    """The parameters of a GPT-2 of about `numel` elements: 6 layers, vocabulary as needed."""
    width = max(8, 64 * round(math.sqrt(0.8 * numel / (12 * LAYERS)) / 64))
    block: list[tuple[int, ...]] = [
        *((width,), (width,)),
        *((width, 3 * width), (3 * width,), (width, width), (width,)),
        *((width,), (width,)),
        *((width, 4 * width), (4 * width,), (4 * width, width), (width,)),
    ]
    positions, norm = (128, width), (width,)
    spent = LAYERS * sum(math.prod(shape) for shape in block) + math.prod(positions) + 2 * width
    vocabulary = max(1, (numel - spent) // width)
    shapes = [(vocabulary, width), positions, *(block * LAYERS), norm, norm]
    numels = [math.prod(shape) for shape in shapes]
    return lay_out(numels, [len(s) > 1 and math.prod(s) >= MIN_NUMEL for s in shapes])


def topk_per_row(vector: torch.Tensor, addend: torch.Tensor, layout: BucketLayout, k: int) -> None:
    """The contender: the sum at full size, torch.topk of its magnitudes, a gather per tensor."""
    t = vector + addend
    for segment in layout.segments:
        if not segment.pruned:
            continue
        whole = t[segment.offset : segment.offset + segment.numel]
        full = segment.numel // CHUNK_NUMEL * CHUNK_NUMEL
        for rows in (whole[:full].view(-1, CHUNK_NUMEL), whole[full:].view(1, -1)):
            if rows.numel():
                kept = math.ceil(k * rows.shape[1] / CHUNK_NUMEL)
                indices = torch.topk(rows.abs(), kept, dim=1, sorted=False).indices
                indices, _ = indices.sort(dim=1)
                indices.to(torch.int16)
                rows.gather(1, indices)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time every part in turn, round after round."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    layout, k = gpt_layout(options.numel), kept_per_chunk(options.density)
    writer = codec.codec_for(k, options.value_bits)
    vector, addend = torch.randn(layout.numel), torch.randn(layout.numel)
    total, copy = torch.zeros(layout.numel), torch.empty_like(vector)
    block, arrived = empty_block(layout, k), empty_block(layout, k)
    payloads = torch.empty((options.world_size, writer.payload_bytes(layout, k)), dtype=torch.uint8)
    for rank, payload in enumerate(payloads):
        select(torch.randn(layout.numel), layout, k, out=block)
        writer.encode(block, step=1, bucket=0, rank=rank, signals=SIGNALS, out=payload)
    select(vector, layout, k, plus=addend, out=block)
    out = torch.empty_like(payloads[0])

    def decode() -> None:
        total.zero_()
        for payload in payloads:
            writer.read_body(codec.read_header(payload), payload, layout, out=arrived)
            scatter_add(total, arrived)

    def encode() -> None:
        writer.encode(block, step=1, bucket=0, rank=0, signals=SIGNALS, out=out)

    parts: dict[str, Callable[[], object]] = {
        "copy_s": lambda: copy.copy_(vector),
        "select_s": lambda: select(vector, layout, k, plus=addend, out=block),
        "topk_baseline_s": lambda: topk_per_row(vector, addend, layout, k),
        "encode_s": encode,
        "decode_s": decode,
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for round_ in range(options.warmup + options.repeats):
        for name, run in parts.items():
            start_s = time.perf_counter()
            run()
            if round_ >= options.warmup:
                times[name].append(time.perf_counter() - start_s)
    return {
        **{name: statistics.median(seconds) for name, seconds in times.items()},
        "fastest": {name: min(seconds) for name, seconds in times.items()},
        "numel": layout.numel,
        "pruned_numel": layout.pruned_numel,
        "density": options.density,
        "k": k,
        "codec": writer.name,
        "payload_bytes": payloads.shape[1],
        "sizes": sizes(layout),
    }


def sizes(layout: BucketLayout) -> list[dict[str, Any]]:
    """What is sent for every width of values; dense segments and header count per parameter."""
    rows = []
    for k in SIZES_AT_K:
        kept = layout.num_kept(k)
        for written in codec.CODECS.values():
            payload_bytes = written.payload_bytes(layout, k)
            sparse_bytes = payload_bytes - codec.HEADER_BYTES
            sparse_bytes -= written.dense.nbytes(layout.dense_numel)
            rows.append(
                {
                    "k": k,
                    "codec": written.name,
                    "payload_bytes": payload_bytes,
                    "bits_per_index": 8 * places_bytes(layout, k) / kept,
                    "bits_per_kept": 8 * sparse_bytes / kept,
                    "bits_per_param": 8 * payload_bytes / layout.numel,
                }
            )
    return rows


def show(result: dict[str, Any], world_size: int) -> None:
    """The tables for people."""
    numel, wire = result["numel"], result["payload_bytes"]
    moved = {  # bytes that must be read or written
        "copy_s": 8 * numel,
        "select_s": 8 * numel,
        "topk_baseline_s": 8 * numel,
        "encode_s": 2 * wire,
        "decode_s": world_size * wire,
    }
    print(f"{numel} elements, k = {result['k']}, {result['codec']}, payload {wire} bytes")
    print(f"{'part':16} {'median ms':>10} {'fastest':>8} {'ns/element':>11} {'GB/s':>7}")
    for name, nbytes in moved.items():
        median_s, fastest_s = result[name], result["fastest"][name]
        print(
            f"{name.removesuffix('_s'):16} {1e3 * median_s:10.3f} {1e3 * fastest_s:8.3f} "
            f"{1e9 * median_s / numel:11.3f} {nbytes / median_s / 1e9:7.2f}"
        )
    heads = ("payload bytes", "bits/index", "bits/kept", "bits/param")
    print(f"\n{'k':>5} {'values':>6} {heads[0]:>14} " + " ".join(f"{h:>10}" for h in heads[1:]))
    for row in result["sizes"]:
        print(
            f"{row['k']:5} {row['codec']:>6} {row['payload_bytes']:14} "
            f"{row['bits_per_index']:10.3f} {row['bits_per_kept']:10.3f} "
            f"{row['bits_per_param']:10.4f}"
        )


def main() -> None:
    """Print the tables and, last, one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--numel", type=int, default=3_300_000, help="parameters of the GPT")
    parser.add_argument("--density", type=float, default=0.05, help="kept / all elements")
    parser.add_argument("--world-size", type=int, default=2, help="payloads to decode and add")
    parser.add_argument("--value-bits", type=int, choices=(2, 4, 16, 32), default=16)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--repeats", type=int, default=11, help="timed rounds, at least 5")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    options = parser.parse_args()
    if options.repeats < 5:
        parser.error("--repeats must be at least 5")
    if not 0.0 < options.density <= 1.0:
        parser.error("--density must be in (0, 1]")
    result = measure(options)
    show(result, options.world_size)
    settings = ("world_size", "value_bits", "threads", "repeats", "warmup")
    result |= {name: vars(options)[name] for name in settings}
    print(json.dumps(result | {"commit": commit(ROOT), "machine": machine()}))


if __name__ == "__main__":
    main()
