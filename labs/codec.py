"""Selection, encoding and decoding of one GPT-shaped bucket on a CPU.

What limits the quantity: selection must read the gradient and the residual once, 8 bytes an element
at float32, so a copy of the vector (4 read, 4 written) is its roofline; encoding and decoding touch
only what is kept. The contender in the same run, in turn with the others, is the obvious way:
`torch.topk` over every row of the sum. Medians after warm-up. A second table has the size of a
payload for every width of values, and the index codes beside plain indices of 12 bits.

    python labs/codec.py [--numel 3300000] [--density 0.05] [--world-size 2] [--dtype float32]
        [--value-bits 16]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_gradprune import codec, sparsify
from ds_gradprune.codec.places import PlaceCode, code_of
from ds_gradprune.records import CHUNK_NUMEL, BucketLayout, RankSignals, SparseBlock
from ds_gradprune.rows import num_kept

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIGNALS = RankSignals(3.0, False, 0.1, 0.01, 0.02, 100_000, 0)
MIN_NUMEL = 4096
LAYERS = 6
SIZES_AT_K = (4, 41, 205, 1024)
PLACES_ROWS = 800


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
    return sparsify.layout_of([torch.Size(shape) for shape in shapes], MIN_NUMEL)


def topk_per_row(vector: torch.Tensor, addend: torch.Tensor, layout: BucketLayout, k: int) -> None:
    """The contender: the sum at full size, torch.topk of its magnitudes, a gather per tensor."""
    t = vector.float() + addend
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


class NewStorage(TorchDispatchMode):
    """Adds up the storages that torch operations make.

    Attributes:
        total_bytes: their sum, whether they still live or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; compare what came out with what went in."""
        before = {_address(leaf) for leaf in tree_leaves((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _address(leaf) not in before:
                self.total_bytes += leaf.untyped_storage().nbytes()
        return result


def _address(leaf: Any) -> int:
    return leaf.untyped_storage().data_ptr() if isinstance(leaf, torch.Tensor) else 0


def extra_bytes(select: Callable[[], SparseBlock]) -> int:
    """Memory that selection takes beside its result: numpy's peak and all of torch's storages."""
    with NewStorage():  # the first dispatch imports half of torch
        select()
    tracemalloc.start()
    with NewStorage() as watch:
        block = select()
    _, numpy_peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    result_bytes = sum(t.nbytes for t in (block.indices, block.values, block.dense))
    return watch.total_bytes + numpy_peak_bytes - result_bytes


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time every part in turn, round after round."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    layout = gpt_layout(options.numel)
    k = max(1, math.ceil(options.density * CHUNK_NUMEL))
    writer = codec.codec_for(k, options.value_bits)
    addend = torch.randn(layout.numel)
    vector = torch.randn(layout.numel).to(DTYPES[options.dtype])
    total, copy = torch.zeros(layout.numel), torch.empty_like(vector)
    payloads = torch.empty((options.world_size, writer.payload_bytes(layout, k)), dtype=torch.uint8)
    for rank in range(options.world_size):
        sent = sparsify.select(torch.randn(layout.numel), layout, k)
        writer.encode(sent, step=1, bucket=0, rank=rank, signals=SIGNALS, out=payloads[rank])
    block = sparsify.select(vector, layout, k, addend=addend)
    out = torch.empty_like(payloads[0])

    def decode() -> None:
        total.zero_()
        for payload in payloads:
            _, arrived = codec.decode(payload, layout)
            positions = sparsify.kept_positions(layout, k, arrived.indices)
            total.index_add_(0, positions, arrived.values)
            total.index_add_(0, sparsify.dense_positions(layout), arrived.dense)

    parts: dict[str, Callable[[], object]] = {
        "copy_s": lambda: copy.copy_(vector),
        "select_s": lambda: sparsify.select(vector, layout, k, addend=addend),
        "topk_baseline_s": lambda: topk_per_row(vector, addend, layout, k),
        "encode_s": lambda: writer.encode(
            block, step=1, bucket=0, rank=0, signals=SIGNALS, out=out
        ),
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
        "select_extra_bytes": extra_bytes(parts["select_s"]),  # type: ignore[arg-type]
        "numel": layout.numel,
        "pruned_numel": layout.pruned_numel,
        "density": options.density,
        "k": k,
        "codec": writer.name,
        "payload_bytes": payloads.shape[1],
    }


def sizes(layout: BucketLayout) -> list[dict[str, Any]]:
    """What is sent for every width of values; dense segments and header count per parameter."""
    rows = []
    for k in SIZES_AT_K:
        kept = num_kept(layout, k)
        for written in codec.CODECS.values():
            payload_bytes = written.payload_bytes(layout, k)
            sparse_bytes = payload_bytes - codec.HEADER_BYTES
            sparse_bytes -= written.dense.nbytes(layout.dense_numel)
            rows.append(
                {
                    "k": k,
                    "codec": written.name,
                    "payload_bytes": payload_bytes,
                    "bits_per_kept": 8 * sparse_bytes / kept,
                    "bits_per_param": 8 * payload_bytes / layout.numel,
                }
            )
    return rows


def places(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Indices alone: time and size of the cheapest code and of 12 plain bits, in turn."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    for k in SIZES_AT_K:
        noise = torch.rand((PLACES_ROWS, CHUNK_NUMEL), generator=generator)
        picked = noise.topk(k, dim=1).indices.sort(dim=1).values
        table = picked.to(torch.int16).numpy()
        row: dict[str, Any] = {"k": k}
        codes = {"": code_of(CHUNK_NUMEL, k), "plain_": PlaceCode(CHUNK_NUMEL, k, 12, 0, False)}
        times: dict[str, list[float]] = {}
        for round_ in range(options.warmup + options.repeats):
            for prefix, code in codes.items():
                out, read = np.empty(code.nbytes(len(table)), np.uint8), np.empty_like(table)
                start_s = time.perf_counter()
                code.write(table, out)
                middle_s = time.perf_counter()
                code.read(out, read)
                end_s = time.perf_counter()
                assert (read == table).all()
                if round_ >= options.warmup:
                    row[f"{prefix}bits_per_index"] = 8 * out.size / table.size
                    times.setdefault(f"{prefix}write_ns", []).append(middle_s - start_s)
                    times.setdefault(f"{prefix}read_ns", []).append(end_s - middle_s)
        for name, seconds in times.items():
            row[name] = 1e9 * statistics.median(seconds) / table.size
        rows.append(row)
    return rows


def environment() -> dict[str, Any]:
    """What the figures hold for."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "commit": commit.stdout.strip() or None,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "google_crc32c": google_crc32c.implementation,
        },
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def show(result: dict[str, Any], world_size: int, value_nbytes: int) -> None:
    """The table for people."""
    numel, wire = result["numel"], result["payload_bytes"]
    moved = {  # bytes that must be read or written
        "copy_s": 2 * value_nbytes * numel,
        "select_s": (value_nbytes + 4) * numel,
        "topk_baseline_s": (value_nbytes + 4) * numel,
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
    print(f"selection takes {result['select_extra_bytes']} bytes beside its result")


def show_sizes(result: dict[str, Any]) -> None:
    """The tables of sizes and of index codes."""
    print(f"\n{'k':>5} {'values':>6} {'payload bytes':>14} {'bits/kept':>10} {'bits/param':>11}")
    for row in result["sizes"]:
        print(
            f"{row['k']:5} {row['codec']:>6} {row['payload_bytes']:14} "
            f"{row['bits_per_kept']:10.3f} {row['bits_per_param']:11.4f}"
        )
    print(f"\n{'k':>5} {'bits/index':>10} {'write ns':>9} {'read ns':>8}   with 12 plain bits")
    for row in result["places"]:
        print(
            f"{row['k']:5} {row['bits_per_index']:10.3f} {row['write_ns']:9.2f} "
            f"{row['read_ns']:8.2f}   {row['plain_write_ns']:.2f}, {row['plain_read_ns']:.2f}"
        )


def main() -> None:
    """Print a table and, last, one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--numel", type=int, default=3_300_000, help="parameters of the GPT")
    parser.add_argument("--density", type=float, default=0.05, help="kept / all elements")
    parser.add_argument("--world-size", type=int, default=2, help="payloads to decode and add")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the gradient")
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
    result |= {"sizes": sizes(gpt_layout(options.numel)), "places": places(options)}
    show(result, options.world_size, DTYPES[options.dtype].itemsize)
    show_sizes(result)
    settings = ("world_size", "dtype", "value_bits", "threads", "repeats", "warmup")
    print(json.dumps(result | {name: vars(options)[name] for name in settings} | environment()))


if __name__ == "__main__":
    main()
