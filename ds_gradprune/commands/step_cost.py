"""What computation a training step takes on this host: random tokens, AdamW, no exchange. Local."""

from __future__ import annotations

import dataclasses
import time
from statistics import fmean, quantiles

import torch

from ds_gradprune.commands.busy import Others
from ds_gradprune.commands.exchange_cost import synchronize
from ds_gradprune.errors import DataError

LEAST_STEPS, SECONDS, MOST_SECONDS = 4, 3.0, 15.0
"""Steps are repeated until both are reached, or two steps and the longest time. The first third
does not count."""

STATE_BYTES = 16
"""Per parameter: fp32 weight, gradient and two moments."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a training step.

    Attributes:
        micro_s: forward and backward of a micro-step.
        optimizer_s: clipping and AdamW.
        quartiles_s: of both together, the lower and the upper one.
        others: cores of this host that others kept busy meanwhile; None: the system does not tell.
    """

    micro_s: float
    optimizer_s: float
    quartiles_s: tuple[float, float]
    others: float | None


def device_here() -> str:
    """Where training would run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_bytes(device: str) -> int:
    """Memory that is left."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":") for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def check_fits(numel: int, device: str) -> None:
    """Refuse to train a model here that has no room.

    Raises:
        DataError: it needs more memory than is left.
    """
    needed, free = STATE_BYTES * numel, free_bytes(device)
    if needed > 0.8 * free:
        raise DataError(
            f"a step of {numel / 1e6:.0f}M parameters needs {needed / 1e9:.1f} GB and more, but "
            f"{free / 1e9:.1f} GB are free on {device}. Give the seconds of a step with --step-s."
        )


def measure_step(
    model: torch.nn.Module, *, batch: int, tokens: int, vocabulary: int, is_bf16: bool
) -> StepTime:
    """Train on random tokens, with AdamW and clipping.

    Args:
        model: a causal language model of transformers, with its memory.
        batch: sequences of a micro-step.
        tokens: of a sequence.
        vocabulary: number of different tokens.
        is_bf16: forward and backward in bfloat16, the optimizer in fp32 beside them.
    """
    device = next(model.parameters()).device
    weights = [p for p in model.parameters() if p.requires_grad]
    masters: list[torch.Tensor] = [*weights]
    if is_bf16:
        masters = [w.detach().clone().requires_grad_() for w in weights]
    if is_bf16:
        model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(masters, lr=1e-4)
    model.train()
    micros, updates = list[float](), list[float]()
    began, others = time.perf_counter(), Others()
    while len(micros) < LEAST_STEPS or time.perf_counter() - began < SECONDS:
        if len(micros) > 1 and time.perf_counter() - began > MOST_SECONDS:
            break
        data = torch.randint(0, vocabulary, (batch, tokens), device=device)
        start = time.perf_counter()
        model(input_ids=data, labels=data).loss.backward()
        synchronize(device)
        middle = time.perf_counter()
        _update(optimizer, masters, weights, is_bf16=is_bf16)
        synchronize(device)
        micros.append(middle - start)
        updates.append(time.perf_counter() - middle)
    busy = others.cores()
    first = -(-len(micros) // 3)  # the first ones allocate, and find their threads
    micros, updates = micros[first:], updates[first:]
    # Means: where others use the cores as well, single steps wait for whole slices of time.
    wholes = [micro_s + update_s for micro_s, update_s in zip(micros, updates, strict=True)]
    quarters = quantiles(wholes, n=4, method="inclusive") if len(wholes) > 1 else wholes * 3
    return StepTime(fmean(micros), fmean(updates), (quarters[0], quarters[-1]), busy)


def _update(
    optimizer: torch.optim.Optimizer,
    masters: list[torch.Tensor],
    weights: list[torch.nn.Parameter],
    *,
    is_bf16: bool,
) -> None:
    if is_bf16:
        for master, weight in zip(masters, weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
    torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    with torch.no_grad():
        for master, weight in zip(masters, weights, strict=True):
            if is_bf16:
                weight.copy_(master)
            weight.grad = None
            master.grad = None
