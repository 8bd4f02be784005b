"""Fine-tune SmolLM2-135M-Instruct on a text: islands beside dense training, paired seeds.

    python -m labs.tuned --model FOLDER --text FILE --out runs.jsonl [--device cuda]

FOLDER is a transformers folder, or holds the GGUF file of `labs/smollm2.sh`. Runs are made side by
side in one process, over the product's `Islands`, as in `labs.convergence`. A method is compared
with dense training of the same seed at the same learning rate; dense training at half and twice
that rate stands beside it. Prints a table, then a JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from labs.convergence.base import Setting
from labs.convergence.grid import Train
from labs.convergence.trial import run_stack
from labs.tuned.jobs import ISLANDS, JOBS, LEARNING_RATES, METHODS, Job
from labs.tuned.llama import Llama
from labs.tuned.tokens import TokenText


def main() -> None:
    """Read the model, make the runs, tell."""
    options = parse(sys.argv[1:])
    began_s = time.monotonic()
    model, tokens = read(options)
    text = TokenText(tokens, options.length)
    print(f"{time.monotonic() - began_s:5.0f} s  model and text are read", flush=True)
    for job in options.runs or [job for job in JOBS if job.kind in options.kinds][: options.jobs]:
        if time.monotonic() - began_s > options.start_before_s:
            print("no time is left for further jobs", flush=True)
            break
        gpt = Llama(model, options.length, lora=job.kind == "lora", device=options.device)
        for row in train(job, gpt, text, options):
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{time.monotonic() - began_s:5.0f} s  {row['kind']}, {row['method']}, lr "
                f"{row['lr']:g}, seed {row['seed']}: {row['bits_per_param']:.4f} bits, loss "
                f"{row['val_loss']:.4f}",
                flush=True,
            )
        del gpt
        if options.device == "cuda":
            torch.cuda.empty_cache()
    rows = table([json.loads(line) for line in options.out.read_text().splitlines()])
    for row in rows:
        print(
            f"{row['kind']:5} {row['method']:18} lr {row['lr']:7g}: {row['runs']} runs, loss "
            f"{row['loss']:.4f}, gap {row['gap_percent']:+.3f} % ({row['error_percent']:.3f}), "
            f"{row['bits']:.4f} bits"
        )
    print(json.dumps({"document": "tuned", "seconds": time.monotonic() - began_s, "rows": rows}))


def read(options: argparse.Namespace) -> tuple[Any, torch.Tensor]:
    """The model on the CPU, and the text as its tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = options.text.read_text(encoding="utf-8")
    if options.tiny:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return LlamaForCausalLM(config), data.long()
    from launch.support.tuning_model import load_tuned

    folder: Path = options.model
    is_plain = (folder / "config.json").is_file()
    model, tokenizer = load_tuned(str(folder if is_plain else next(folder.glob("*.gguf"))))
    numbers = tokenizer(text, add_special_tokens=False)["input_ids"]
    return model, torch.tensor(numbers, dtype=torch.int64)


def train(
    job: Job, gpt: Llama, text: TokenText, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All runs of a job, side by side."""
    settings, methods = [], []
    for factor in job.factors:
        hyper = Train(
            batch=options.rows,
            lr=LEARNING_RATES[job.kind] * factor,
            lr_warmup_steps=max(1, options.steps // 10),
            lr_end=0.05,
            weight_decay=0.0,
            warmup_steps=min(10, options.steps // 10),
        )
        for name in job.methods:
            for seed in range(min(job.seeds, options.seeds)):
                place = (options.device, options.device)
                settings.append(Setting(gpt, hyper, ISLANDS, options.steps, seed, *place))
                methods.append(METHODS[name])
    rows = run_stack(settings, methods, text, tell=_tell)
    return [
        {
            "kind": job.kind,
            "method": method.name,
            "lr": setting.train.lr,
            "seed": setting.seed,
            "steps": options.steps,
            "tokens": options.rows * options.length,
            "trained": gpt.numel,
        }
        | row
        for setting, method, row in zip(settings, methods, rows, strict=True)
    ]


def _tell(number: int, step: int, loss: float) -> None:
    """What is known of a run that goes on: it may be cut."""
    print(f"       run {number}, after {step} steps: {loss:.4f} on a part", flush=True)


def table(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every method beside dense training of the same seed, at the job's own learning rate.

    Returns:
        Rows: mean loss, mean gap in % and its standard error (0 with one run), bits.
    """
    rows = []
    for kind, lr in LEARNING_RATES.items():
        here = [run for run in runs if run["kind"] == kind]
        dense = {
            run["seed"]: run["val_loss"]
            for run in here
            if run["method"] == "dense" and run["lr"] == lr
        }
        for method in METHODS:
            for rate in sorted({run["lr"] for run in here if run["method"] == method}):
                mine = [r for r in here if r["method"] == method and r["lr"] == rate]
                gaps = [
                    100 * (run["val_loss"] / dense[run["seed"]] - 1)
                    for run in mine
                    if run["seed"] in dense
                ]
                if gaps:
                    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
                    rows.append(
                        {
                            "kind": kind,
                            "method": method,
                            "lr": rate,
                            "runs": len(gaps),
                            "loss": statistics.mean(run["val_loss"] for run in mine),
                            "gap_percent": statistics.mean(gaps),
                            "error_percent": error,
                            "bits": statistics.mean(run["bits_per_param"] for run in mine),
                        }
                    )
    return rows


def _job(text: str) -> Job:
    kind, _, method = text.partition(": ")
    if kind not in LEARNING_RATES or method not in METHODS:
        raise argparse.ArgumentTypeError(f"must be 'full: METHOD' or 'lora: METHOD', got {text!r}")
    return Job(kind, (method,))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("."), help="folder of the model")
    parser.add_argument("--text", type=Path, required=True, help="what it is tuned on")
    parser.add_argument("--out", type=Path, required=True, help="runs, a line of JSON each")
    parser.add_argument("--seeds", type=int, default=4, help="of every method, at most")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=4, help="sequences of an island per step")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--kinds", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument(
        "--runs",
        nargs="+",
        type=_job,
        help="'KIND: METHOD' each, in this order, in place of the usual jobs",
    )
    parser.add_argument("--jobs", type=int, help="only the first so many")
    parser.add_argument("--start-before-s", type=float, default=1e9, help="no job begins later")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
