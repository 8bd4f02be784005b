"""What the tests of launch/*.py train with: a tiny text, a tiny model, a configuration."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel

from textgen.corpus import open_text
from textgen.model import save_model
from textgen.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 32

RESULT_KEYS = {
    "steps",
    "val_loss",
    "val_loss_start",
    "wire_bytes",
    "dense_bytes",
    "density_min",
    "density_max",
}

# One density for all steps: what is measured must not decide what is trained, or no two runs of a
# test would be alike. The latency keeps a run alive long enough to be interrupted.
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    "gradient_pruning": {
        "prune": "gradient",
        "window_size": 4,
        "warmup_steps": 3,
        "ramp_steps": 0,
        "density": {"initial": 0.1, "min": 0.1, "max": 0.1},
        "throttle": {"schedule": [{"step": 0, "rate_mbit": 1000, "latency_s": 0.05}]},
    },
}


def write_config(path: Path, **changes: Any) -> Path:
    """Write CONFIG with changes; a value of None leaves the key out."""
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    path.write_text(json.dumps(config))
    return path


def write_text(path: Path) -> Path:
    """A text of some thousand tokens in which there is something to learn."""
    animals, verbs = ("fox", "dog", "cat", "hen"), ("sees", "hears", "follows")
    lines = [
        f"{i}. the {animals[i % 4]} {verbs[i % 3]} the {animals[i * 7 % 4]}\n" for i in range(800)
    ]
    path.write_text("".join(lines))
    return path


def write_model(folder: Path, text: Path) -> Path:
    """A model folder of two layers whose matrices are just large enough to be pruned."""
    tokenizer = train_tokenizer(open_text(text), 300)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=SEQ_LEN,
            n_embd=64,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            attn_pdrop=0.1,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    save_model(model, tokenizer, folder)
    return folder


def write_inputs(folder: Path) -> Path:
    """A folder with text.txt, model/ and config.json."""
    text = write_text(folder / "text.txt")
    write_model(folder / "model", text)
    write_config(folder / "config.json")
    return folder


def block(**changes: Any) -> dict[str, Any]:
    """Our block of CONFIG with changes, as a change of CONFIG."""
    return {"gradient_pruning": CONFIG["gradient_pruning"] | changes}


def arguments(here: Path, out: Path, **changes: str | None) -> list[str]:
    """Flags of launch/train.py for what `write_inputs` wrote; a value of None leaves one out."""
    flags: dict[str, str | None] = {
        "--config": str(here / "config.json"),
        "--model": str(here / "model"),
        "--text": str(here / "text.txt"),
        "--steps": "12",
        "--out": str(out),
    }
    flags |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return [part for pair in flags.items() if pair[1] is not None for part in pair if part]


def free_port() -> str:
    """A port that nobody listens on right now.

    It lies below those that Linux gives to outgoing connections: one of another test could take it
    before the ranks listen.
    """
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return str(port)


def script_environ() -> dict[str, str]:
    """An environment in which the scripts find the package, without a launcher's variables."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI_", "MPI_")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    return environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start_ranks(arguments: list[str], world_size: int = 2) -> list[subprocess.Popen[str]]:
    """Start launch/train.py as mpirun would: Open MPI's variables and nothing else."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "launch/train.py", *arguments],
            cwd=ROOT,
            env=script_environ()
            | {
                "OMPI_COMM_WORLD_RANK": str(rank),
                "OMPI_COMM_WORLD_SIZE": str(world_size),
                "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
                "OMPI_COMM_WORLD_LOCAL_SIZE": str(world_size),
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout_s: float = 200.0) -> list[str]:
    """Wait for all; return what each wrote to stderr. None outlives this call."""
    deadline_s = time.monotonic() + timeout_s
    try:
        return [
            process.communicate(timeout=max(1.0, deadline_s - time.monotonic()))[1]
            for process in processes
        ]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


def wait_for_step(log: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    """Return when the log holds a step, or a process has ended."""
    while all(process.poll() is None for process in processes):
        if log.is_file() and len(log.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)


def log_of(run: Path) -> list[dict[str, Any]]:
    """The run's steps."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
