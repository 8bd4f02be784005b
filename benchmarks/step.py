"""One optimizer step on two ranks of one machine: what pruning costs and what it saves.

What limits the quantity: the dense path moves 4 bytes per parameter over the link each step; the
pruned one moves density * 28 bits and pays selection, encoding and decoding on the CPU instead.
`density_*` prunes the gradient, `update_*` the optimizer's update between two islands; "naive" is
the simplest exchange that prunes (benchmarks/naive.py). The link is emulated (the throttle
transport sleeps as long as the bytes would take), so the figures hold for the codec and the step
loop, not for TCP. All variants live in the same two processes and are run in turn, round after
round; medians over steps after each variant's warm-up.

    python benchmarks/step.py [--rate-mbit 100] [--rounds 5] [--steps 6]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SEQUENCE, BATCH = 128, 2
NAIVE_K = 205  # of 4096: 5 %


def variants(rate_mbit: float) -> dict[str, dict[str, Any] | None]:
    """Name -> gradient_pruning block; None is DeepSpeed alone, or with benchmarks/naive.py."""

    def block(density: float, throttled: bool = True, **more: Any) -> dict[str, Any]:
        link = {"schedule": [{"step": 0, "rate_mbit": rate_mbit}]} if throttled else None
        return {
            "prune": "gradient",
            "warmup_steps": 0,
            "ramp_steps": 0,
            "density": {"initial": density, "min": density, "max": density},
            "verify_every_steps": None,
            "throttle": link,
            **more,
        }

    return {
        "deepspeed": None,
        "dense": block(1.0, throttled=False),
        "dense_slow": block(1.0),
        "density_5_slow": block(0.05),
        "density_1_slow": block(0.01),
        "naive_5_slow": None,
        "density_5": block(0.05, throttled=False),
        "density_1": block(0.01, throttled=False),
        "update_1_slow": block(0.01, prune="update"),
        "update_5": block(0.05, throttled=False, prune="update"),
        "update_1": block(0.01, throttled=False, prune="update"),
    }


def make_engine(block: dict[str, Any] | None) -> Any:
    """A GPT of 3.3M parameters under AdamW."""
    import torch
    import transformers

    import ds_gradprune

    torch.manual_seed(0)
    shape = {"n_embd": 192, "n_layer": 6, "n_head": 6, "vocab_size": 3300, "n_positions": SEQUENCE}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **shape,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": None,
        "gradient_pruning": block or {"enabled": False},
    }
    return ds_gradprune.initialize(model=model, model_parameters=model.parameters(), config=config)[
        0
    ]


def rank_main(options: argparse.Namespace) -> None:
    """Run all variants in turn; rank 0 writes what it measured."""
    import deepspeed
    import torch

    from benchmarks import naive
    from ds_gradprune.textgen.ranks import leave_group
    from ds_gradprune.transport.throttle import RatePoint, ThrottledTransport
    from ds_gradprune.transport.torchdist import TorchDistTransport

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank = int(os.environ["RANK"])
    deepspeed.init_distributed(
        "gloo", init_method=f"file://{options.store}", rank=rank, world_size=2, verbose=False
    )
    engines = {name: make_engine(block) for name, block in variants(options.rate_mbit).items()}
    link = [RatePoint(0, options.rate_mbit * 1e6 / 8)]
    naive.install(
        engines["naive_5_slow"], ThrottledTransport(TorchDistTransport(), link), k=NAIVE_K
    )
    measured: dict[str, dict[str, list[float]]] = {
        name: {"step_time_s": [], "codec_time_s": [], "comm_time_s": [], "wire_bytes": []}
        for name in engines
    }
    generator = torch.Generator().manual_seed(rank)
    for round_ in range(options.rounds + 1):
        for name, engine in engines.items():
            for _ in range(options.steps):
                tokens = torch.randint(0, 3300, (BATCH, SEQUENCE), generator=generator)
                start_s = time.perf_counter()
                loss = engine(input_ids=tokens, labels=tokens).loss
                engine.backward(loss)
                engine.step()
                if round_ > 0:  # the first round warms up
                    _note(measured[name], time.perf_counter() - start_s, engine.gradprune.report)
    if rank == 0:
        numel = sum(p.numel() for p in engines["deepspeed"].module.parameters())
        Path(options.out).write_text(json.dumps({"numel": numel, "measured": measured}))
    leave_group()


def _note(lists: dict[str, list[float]], step_time_s: float, report: Any) -> None:
    lists["step_time_s"].append(step_time_s)
    if report is not None:
        for name in ("codec_time_s", "comm_time_s", "wire_bytes"):
            lists[name].append(getattr(report, name))


def summarize(measured: dict[str, Any], rate_mbit: float) -> dict[str, Any]:
    """Medians and interquartile ranges per variant."""
    methods = {}
    for name, lists in measured["measured"].items():
        quartiles = statistics.quantiles(lists["step_time_s"], n=4)
        methods[name] = {
            key: statistics.median(values) if values else None for key, values in lists.items()
        } | {"step_time_iqr_s": quartiles[2] - quartiles[0], "steps": len(lists["step_time_s"])}
    return {
        "numel": measured["numel"],
        "tokens_per_step": 2 * BATCH * SEQUENCE,
        "rate_mbit": rate_mbit,
        "methods": methods,
    }


def main() -> None:
    """Start two ranks, print a table and, last, one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate-mbit", type=float, default=100.0, help="emulated link, Mbit/s")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all variants")
    parser.add_argument("--steps", type=int, default=6, help="steps of a variant in a round")
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "RANK" in os.environ:
        rank_main(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--store", f"{folder}/store"]
        env = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
        env |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        ranks = [
            subprocess.Popen(
                [*command, "--out", str(out)],
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
        if any(process.wait() for process in ranks):
            sys.exit(1)
        result = summarize(json.loads(out.read_text()), options.rate_mbit)
    print(f"{'variant':16} {'step s':>8} {'IQR':>7} {'codec s':>8} {'comm s':>8} {'KB sent':>9}")
    for name, row in result["methods"].items():
        cells = [
            row["step_time_s"],
            row["step_time_iqr_s"],
            row["codec_time_s"],
            row["comm_time_s"],
        ]
        shown = " ".join("       -" if cell is None else f"{cell:8.4f}" for cell in cells)
        sent = "-" if row["wire_bytes"] is None else f"{row['wire_bytes'] / 1e3:.1f}"
        print(f"{name:16} {shown} {sent:>9}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
