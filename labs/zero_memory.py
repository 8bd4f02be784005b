"""Memory of a rank at every ZeRO stage: islands beside plain DeepSpeed that divides as they do.

Two islands of two ranks train a stack of square layers, whose activations are small beside its
weights. Plain DeepSpeed trains on two ranks, so every rank holds as large a part of the model as a
rank of an island. One case after the other, every rank in a process of its own, over loopback. What
is told is the resident set less that of the same process before it had a model: between two steps
in bytes per parameter of the model, and at its highest during three steps.

    python -m labs.zero_memory [--stages 0 1 2 3] [--layers 10] [--width 2048]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from labs.machine import commit, machine

ROOT = Path(__file__).resolve().parents[1]
RANKS_PER_ISLAND = 2
PINNED = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    # What is freed goes back to the kernel, or the resident set would say nothing.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
WAYS: dict[str, dict[str, Any] | None] = {
    "plain DeepSpeed": None,
    "islands": {},
    "islands, hidden": {"overlap": "auto"},
    "islands, residual reset": {"residual": "reset", "sync_every": 2},
}
STEPS = 3


def rank_main(case: dict[str, Any]) -> None:
    """One rank of one case: trains, and writes what it held."""
    import deepspeed
    import torch
    import torch.distributed as dist

    import ds_gradprune

    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{case['store']}", rank=rank, world_size=world_size
    )
    dist.barrier()
    before_bytes = _resident("VmRSS")
    width = case["width"]
    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(case["layers"])]
    model = torch.nn.Sequential(*layers)
    parameters = width * width * case["layers"]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": case["bf16"]},
        "zero_optimization": {"stage": case["stage"]},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    if case["block"] is None:
        engine = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config
        )[0]
    else:
        density = {"initial": 0.01, "min": 0.01, "max": 0.01}
        block = {"warmup": "unpruned", "warmup_steps": 1, "ramp_steps": 0, "density": density}
        block |= {"island": {"ranks": RANKS_PER_ISLAND}} | case["block"]
        config["gradient_pruning"] = block
        engine = ds_gradprune.initialize(
            model=model, model_parameters=model.parameters(), config=config
        )[0]
    dtype = torch.bfloat16 if case["bf16"] else torch.float32
    del layers, model

    def train() -> None:
        for _ in range(STEPS):
            engine.backward(engine(torch.randn(4, width, dtype=dtype)).square().mean())
            engine.step()

    train()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    train()
    peak_bytes = _resident("VmHWM")
    gc.collect()
    rest_bytes = _resident("VmRSS")
    held = 0 if case["block"] is None else engine.gradprune.held_bytes
    told = {
        "rest_bytes_per_parameter": (rest_bytes - before_bytes) / parameters,
        "peak_bytes_per_parameter": (peak_bytes - before_bytes) / parameters,
        "held_bytes_per_parameter": held / parameters,
        "libraries_bytes": before_bytes,
    }
    Path(case["out"]).with_suffix(f".{rank}").write_text(json.dumps(told))
    dist.barrier()


def measure(stage: int, way: str, flags: argparse.Namespace) -> dict[str, Any]:
    """One case: the means over its ranks."""
    block = WAYS[way]
    world_size = RANKS_PER_ISLAND * (1 if block is None else 2)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rank"
        case = {"stage": stage, "block": block, "store": f"{folder}/store", "out": str(out)}
        case |= {"layers": flags.layers, "width": flags.width, "bf16": flags.bf16}
        words = [sys.executable, "-m", "labs.zero_memory", "--rank", json.dumps(case)]
        ranks = []
        for rank in range(world_size):
            own = {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
            own |= {"LOCAL_RANK": str(rank), "LOCAL_SIZE": str(world_size)}
            env = os.environ | PINNED | own
            ranks.append(subprocess.Popen(words, cwd=ROOT, env=env, stdout=2))
        codes = [process.wait(timeout=flags.timeout_s) for process in ranks]
        if any(codes):
            raise SystemExit(f"stage {stage}, {way}: ranks ended with {codes}")
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank.*"))]
    mean = {key: sum(one[key] for one in found) / len(found) for key in found[0]}
    return {"stage": stage, "way": way} | {key: round(value, 3) for key, value in mean.items()}


def _resident(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise AssertionError(field)


def main(arguments: list[str] | None = None) -> None:
    """Print a table and, last, one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--ways", nargs="+", choices=sorted(WAYS), default=list(WAYS))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="of a case")
    parser.add_argument("--rank", type=json.loads, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.rank is not None:
        rank_main(flags.rank)
        return
    rows = []
    for stage in flags.stages:
        for way in flags.ways:
            row = measure(stage, way, flags)
            rows.append(row)
            print(
                f"stage {stage}  {way:24} rest {row['rest_bytes_per_parameter']:6.2f}  peak "
                f"{row['peak_bytes_per_parameter']:6.2f}  held "
                f"{row['held_bytes_per_parameter']:5.2f}",
                flush=True,
            )
    document = {
        "machine": machine(),
        "commit": commit(ROOT),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "parameters": flags.layers * flags.width**2,
        "bf16": flags.bf16,
        "ranks_per_island": RANKS_PER_ISLAND,
        "rows": rows,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
