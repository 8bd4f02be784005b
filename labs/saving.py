"""What a checkpoint costs beside DeepSpeed's own: seconds and bytes, to save and to load.

Two ranks of one machine, each an island, train a model of square layers for three steps. Then they
save and load it in turns, plain DeepSpeed first. The disk's own speed stands beside it: the same
bytes, written and flushed. So does a copy of them in memory, which is the least that a background
save would leave in the foreground.

    python -m labs.saving [--layers 10] [--rounds 5] [--out results/NAME.json]

The last line of stdout is one JSON document. With --out it is written there, with a page beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from labs.machine import commit, machine

ROOT = Path(__file__).resolve().parents[1]
WIDTH, RANKS, STEPS = 1024, 2, 3
MODES = ("DeepSpeed alone", "update", "gradient")
OURS = "gradient_pruning_"


def main() -> int:
    """Measure, and print one JSON document; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=10, help="of 1024 x 1024 (default: 10)")
    parser.add_argument("--rounds", type=int, default=5, help="saves and loads (default: 5)")
    parser.add_argument("--folder", type=Path, help="where to save (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="JSON file; a page is written beside it")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.rank is not None:
        print(json.dumps(_rank(flags.layers, flags.rounds, flags.folder)))
        return 0
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        document = _measure(flags.layers, flags.rounds, Path(folder))
    if flags.out is not None:
        flags.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        flags.out.with_suffix(".md").write_text(page(document), encoding="utf-8")
    print(json.dumps(document))
    return 0


def _measure(layers: int, rounds: int, folder: Path) -> dict[str, Any]:
    port = str(20000 + os.getpid() % 20000)
    words = [sys.executable, "-m", "labs.saving", "--layers", str(layers), "--rounds", str(rounds)]
    place = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [*words, "--folder", str(folder), "--rank", str(rank)],
            cwd=ROOT,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    told = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank has failed; see above")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(ROOT),
        "machine": machine(),
        "command": shlex.join(["python", "-m", "labs.saving", *sys.argv[1:]]),
        **json.loads(told[0].splitlines()[-1]),
    }


# ---- one rank ------------------------------------------------------------------------------------


def _rank(layers: int, rounds: int, folder: Path) -> dict[str, Any]:
    """What rank 0 has measured. Collective."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rows = {
        mode: _mode(mode, layers, rounds, folder / str(number)) for number, mode in enumerate(MODES)
    }
    numel = layers * WIDTH * WIDTH
    return {"parameters": numel, "rounds": rounds, "modes": rows} | _disk(rows, rounds, folder)


def _mode(mode: str, layers: int, rounds: int, folder: Path) -> dict[str, Any]:
    engine = _engine(mode, layers)
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        engine.backward(engine(torch.randn(4, WIDTH, generator=generator)).square().mean())
        engine.step()
    saves, loads = [], []
    for number in range(rounds):
        tag = f"tag{number % 2}"
        saves.append(_timed(partial(engine.save_checkpoint, str(folder), tag=tag)))
        loads.append(_timed(partial(engine.load_checkpoint, str(folder), tag=tag)))
    files = [path for path in (folder / "tag0").iterdir() if path.is_file()]
    ours = sum(path.stat().st_size for path in files if path.name.startswith(OURS))
    whole = sum(path.stat().st_size for path in files)
    torch.distributed.barrier()
    if rank == 0:
        shutil.rmtree(folder)
    return {"save_s": saves, "load_s": loads, "our_bytes": ours, "bytes": whole}


def _engine(mode: str, layers: int) -> Any:
    import deepspeed

    import ds_gradprune

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    if mode != MODES[0]:
        density = {"initial": 0.05, "min": 0.05, "max": 0.05}
        block = {"prune": mode, "warmup_steps": 1, "ramp_steps": 0, "density": density}
        config["gradient_pruning"] = block | {"island": {"ranks": 1}}
    make: Any = deepspeed if mode == MODES[0] else ds_gradprune
    return make.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


def _timed(work: Callable[[], object]) -> float:
    """Seconds until all ranks have done it. Collective."""
    torch.distributed.barrier()
    began_s = time.perf_counter()
    work()
    torch.distributed.barrier()
    return time.perf_counter() - began_s


def _disk(rows: dict[str, Any], rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds to write and flush, and to copy in memory, what all ranks save with islands."""
    found: dict[str, list[float]] = {"disk_s": [], "copy_s": []}
    data = torch.zeros(rows["update"]["bytes"], dtype=torch.uint8)
    copy = torch.empty_like(data)
    if torch.distributed.get_rank() == 0:
        for _ in range(rounds):
            began_s = time.perf_counter()
            with open(folder / "raw", "wb") as file:
                file.write(memoryview(data.numpy()))
                file.flush()
                os.fsync(file.fileno())
            found["disk_s"].append(time.perf_counter() - began_s)
            began_s = time.perf_counter()
            copy.copy_(data)
            found["copy_s"].append(time.perf_counter() - began_s)
    torch.distributed.barrier()
    return found


# ---- the page ------------------------------------------------------------------------------------


def page(document: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    lines = [
        "# What a checkpoint costs beside DeepSpeed's own",
        "",
        f"Written by `{document['command']}` on {document['date']}, commit {document['commit']}, "
        f"{document['machine']['cpu']}, {document['machine']['cores']} cores, load "
        f"{document['machine']['load_average'][0]:.1f} at the end, torch "
        f"{document['machine']['versions']['torch']}, deepspeed "
        f"{document['machine']['versions']['deepspeed']}. A model of "
        f"{document['parameters'] / 1e6:.1f}M parameters, AdamW in fp32, {RANKS} ranks on one "
        f"disk, each an island. Medians of {document['rounds']}, and the range.",
        "",
        "| | save, s | load, s | MB, all ranks | of them ours |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for mode, row in document["modes"].items():
        lines.append(
            f"| {mode} | {_spread(row['save_s'])} | {_spread(row['load_s'])} | "
            f"{row['bytes'] / 1e6:.1f} | {row['our_bytes'] / 1e6:.1f} |"
        )
    islands = document["modes"]["update"]["bytes"] / 1e6
    lines += [
        "",
        f"The disk takes {_spread(document['disk_s'])} s to write and flush the {islands:.1f} MB "
        f"of `update` at once. A copy of them in memory takes {_spread(document['copy_s'])} s.",
    ]
    return "\n".join(lines) + "\n"


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    sys.exit(main())
