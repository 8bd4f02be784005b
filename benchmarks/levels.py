"""Which 16 or 4 levels lose least of the values that survive selection.

A small GPT learns real text, byte by byte, with error feedback and chunk-wise top-k, once pruning
its gradients and once its AdamW updates; the values it would send are collected on the way. Beside
them stand the survivors of three known distributions. Figures are squared errors over squared
values, scales as bfloat16, one block per 128 values. What rounding loses is not lost to training,
it stays in the residual; so this ranks level sets and says nothing about the loss of a run.

    python benchmarks/levels.py --text FILE [--steps 200] [--k 4 41 205]

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ds_gradprune import sparsify
from ds_gradprune.codec.levels import BLOCK_NUMEL, Levels
from ds_gradprune.records import CHUNK_NUMEL
from ds_gradprune.textgen.model import build_model, quiet_transformers

Floats: TypeAlias = npt.NDArray[np.float32]
MIN_NUMEL, LENGTH, DENSE_STEPS, SAMPLES = 4096, 64, 20, 3
RATE, BETA1, BETA2 = 2e-3, 0.9, 0.95


def survivors_of_text(
    text: bytes, prune: str, k: int, steps: int, batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Kept values and dense segments of a few steps of one worker, as the codec would see them."""
    model = build_model("nano", 256, 0, seed=0)
    parameters = list(model.parameters())
    layout = sparsify.layout_of([p.shape for p in parameters], MIN_NUMEL)
    shared = torch.nn.utils.parameters_to_vector(parameters).detach()
    residual, first, second = (torch.zeros_like(shared) for _ in range(3))
    generator = torch.Generator().manual_seed(1)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def adam(gradient: torch.Tensor, step: int) -> torch.Tensor:
        first.mul_(BETA1).add_(gradient, alpha=1 - BETA1)
        second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        root = (second / (1 - BETA2**step)).sqrt() + 1e-8
        return RATE * min(1.0, step / 50) * (first / (1 - BETA1**step)) / root

    for step in range(1, steps + 1):
        own = shared - residual if prune == "update" else shared
        torch.nn.utils.vector_to_parameters(own, parameters)
        starts = torch.randint(0, len(data) - LENGTH, (batch,), generator=generator)
        tokens = torch.stack([data[start : start + LENGTH] for start in starts])
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradient = torch.cat([p.grad.view(-1) for p in parameters if p.grad is not None])
        gradient *= min(1.0, 1.0 / float(gradient.norm()))
        vector = adam(gradient, step) if prune == "update" else gradient
        if step > DENSE_STEPS:
            block = sparsify.select(vector, layout, k, addend=residual)
            sent = torch.zeros_like(vector)
            sent[sparsify.kept_positions(layout, k, block.indices)] = block.values
            sent[sparsify.dense_positions(layout)] = block.dense
            residual += vector - sent
            vector = sent
            if step % (steps // SAMPLES) == 0:
                yield block.values, block.dense
        shared = shared - (vector if prune == "update" else adam(vector, step))


def survivors_of(draw: Callable[[tuple[int, int]], npt.NDArray[np.float64]]) -> torch.Tensor:
    """The 41 largest of each of 500 chunks, in the order of the wire."""
    chunks = draw((500, CHUNK_NUMEL)).astype(np.float32)
    kept = np.sort(np.argpartition(-np.abs(chunks), 41, axis=1)[:, :41], axis=1)
    return torch.from_numpy(np.take_along_axis(chunks, kept, 1).reshape(-1))


def nearest(magnitudes: Floats, levels: Floats) -> Floats:
    """The nearest of (blocks, n) rising levels for every one of (blocks, 128) magnitudes."""
    found = np.repeat(levels[:, :1], magnitudes.shape[1], axis=1)
    for lower, upper in zip(levels.T[:-1], levels.T[1:], strict=True):
        found = np.where(magnitudes > (lower + upper)[:, None] / 2, upper[:, None], found)
    return found


def level_sets(magnitudes: Floats) -> dict[str, Floats]:
    """What else could be sent: name -> (blocks, n) levels."""
    low, high = (
        torch.from_numpy(end).bfloat16().float().numpy()
        for end in (magnitudes.min(axis=1, keepdims=True), magnitudes.max(axis=1, keepdims=True))
    )
    count = np.arange(8, dtype=np.float32)
    floor = np.maximum(np.maximum(low, high / 64), np.float32(1e-30))
    band = np.where(high > 15 * low, 0, low)
    steps = np.concatenate(([0.0], np.cumsum(1.2 ** np.arange(7))))
    return {
        "4 bits, scale: uniform": high * (count + 1) / 8,
        "4 bits, scale: uniform with 0": high * count / 7,
        "4 bits, scale: logarithmic, 1 to 5": high * 5 ** (count / 7 - 1),
        "4 bits, scale: logarithmic, 1 to 16": high * 16 ** (count / 7 - 1),
        "4 bits, scale: E2M1": high * np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6,
        "4 bits, band: uniform": band + (high - band) * count / 7,
        "4 bits, band: logarithmic": floor * (high / floor) ** (count / 7),
        "4 bits, band: steps grow by 1.2": band + (high - band) * steps / steps[-1],
        "2 bits, scale: half and whole": high * np.array([0.5, 1.0]),
        "2 bits, scale: 0 and whole": high * np.array([0.0, 1.0]),
        "2 bits, band: its ends": np.concatenate((np.where(high > 3 * low, 0, low), high), axis=1),
    }


def errors(samples: list[torch.Tensor]) -> dict[str, float]:
    """Squared error over squared values, for every set of levels."""
    lost: dict[str, float] = {}
    total = 0.0
    for values in samples:
        whole = values[: len(values) // BLOCK_NUMEL * BLOCK_NUMEL]
        magnitudes = whole.abs().numpy().reshape(-1, BLOCK_NUMEL)
        total += float(whole.double().square().sum())
        found = {name: nearest(magnitudes, s) for name, s in level_sets(magnitudes).items()}
        for bits in (4, 2):
            sent = Levels(bits).rounded(whole).abs().numpy()
            found[f"{bits} bits, codec"] = sent.reshape(-1, BLOCK_NUMEL)
        for name, levels in found.items():
            square = float(((magnitudes - levels).astype(np.float64) ** 2).sum())
            lost[name] = lost.get(name, 0.0) + square
    return {name: square / total for name, square in sorted(lost.items())}


def main() -> None:
    """Print a table and, last, one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a text file to learn from")
    parser.add_argument("--steps", type=int, default=200, help="of each of the runs, at least 60")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 41, 205], help="kept per chunk")
    parser.add_argument("--batch", type=int, default=12, help="sequences of 64 bytes a step")
    options = parser.parse_args()
    if options.steps < 60:
        parser.error("--steps must be at least 60")
    quiet_transformers()
    torch.set_num_threads(1)
    sets: dict[str, list[torch.Tensor]] = {}
    for prune in ("gradient", "update"):
        for k in options.k:
            for kept, dense in survivors_of_text(
                options.text.read_bytes(), prune, k, options.steps, options.batch
            ):
                sets.setdefault(f"{prune} k={k}", []).append(kept)
                sets.setdefault(f"{prune} dense", []).append(dense)
    rng = np.random.default_rng(0)
    sets["normal"] = [survivors_of(rng.standard_normal)]
    sets["Laplace"] = [survivors_of(lambda shape: rng.laplace(size=shape))]
    sets["Student t3"] = [survivors_of(lambda shape: rng.standard_t(3, shape))]
    table = {name: errors(samples) for name, samples in sets.items()}
    names = list(next(iter(table.values())))
    print(" " * 36 + "".join(f"{name:>15}" for name in table))
    for name in names:
        print(f"{name:36}" + "".join(f"{100 * row[name]:14.3f}%" for row in table.values()))
    print(json.dumps({"squared_error": table, "steps": options.steps, "batch": options.batch}))


if __name__ == "__main__":
    main()
