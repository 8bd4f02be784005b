"""One rank of a small DeepSpeed training, for tests: called through `run_processes`."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

VOCAB, WIDTH, LENGTH, BATCH = 512, 64, 16, 4


class TinyLM(nn.Module):
    """Tied embedding, one MLP, a layer norm: pruned matrices, dense vectors, a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.1)  # tied: keeps the first loss near ln 512
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.unused = nn.Linear(WIDTH, 100)  # never gets a gradient

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens[:, :-1])
        hidden = self.norm(hidden + self.down(torch.relu(self.up(hidden))))
        logits = hidden @ self.embed.weight.T
        return nn.functional.cross_entropy(
            logits.float().reshape(-1, VOCAB), tokens[:, 1:].reshape(-1)
        )


def batch(step: int, micro_step: int, rank: int) -> torch.Tensor:
    """Learnable tokens: each is the one before plus 3, from a start drawn for this batch."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro_step + rank)
    start = torch.randint(0, VOCAB, (BATCH, 1), generator=generator)
    return (start + 3 * torch.arange(LENGTH)) % VOCAB


def start_deepspeed() -> Any:
    """Open DeepSpeed's backend on gloo, without compiling its shared-memory op."""
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "gloo",
        init_method=f"file://{os.environ['DS_TEST_STORE']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        verbose=False,
    )
    return deepspeed


def ds_config(
    block: dict[str, Any] | None, *, gas: int = 1, bf16: bool = False, **extra: Any
) -> dict[str, Any]:
    """A whole ds_config for `TinyLM`."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": gas,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 2e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True},
        },
        "steps_per_print": None,
        "bf16": {"enabled": bf16},
    }
    if block is not None:
        config["gradient_pruning"] = block
    return config | extra


def make_engine(
    block: dict[str, Any] | None, way: str = "initialize", virtual: bool = True, **options: Any
) -> Any:
    """An engine around a fresh `TinyLM`, tied to us in one of the ways, or not at all."""
    deepspeed = start_deepspeed()
    import ds_gradprune
    from ds_gradprune.deepspeed.attach import Clock, attach
    from tests.helpers.ranks import VirtualClock

    torch.manual_seed(0)
    arguments = {"model": TinyLM(), "config": ds_config(block, **options)}
    arguments["model_parameters"] = arguments["model"].parameters()
    if way == "initialize" and not virtual:
        return ds_gradprune.initialize(**arguments)[0]
    if way == "register":
        ds_gradprune.register()
        return deepspeed.initialize(**arguments)[0]
    if way == "islands":
        from ds_gradprune.deepspeed.initialize import create

        engine = create(**arguments)[0]
    else:
        engine = deepspeed.initialize(**arguments)[0]
    if way != "plain":
        clock = VirtualClock()
        attach(engine, clock=Clock(clock.now_s, clock.sleep) if virtual else None)
    return engine


def run_steps(
    engine: Any, first: int, last: int, on_step: Callable[[int], None] | None = None
) -> dict[str, list[Any]]:
    """Train steps first .. last (from 1); what each step was like."""
    from ds_gradprune.deepspeed.monitor import as_json

    rank = dist.get_rank()
    trace: dict[str, list[Any]] = {"losses": [], "crcs": [], "reports": []}
    for step in range(first, last + 1):
        losses = []
        for micro_step in range(engine.gradient_accumulation_steps()):
            loss = engine(batch(step, micro_step, rank))
            engine.backward(loss)
            losses.append(float(loss.detach()))
            engine.step()
        trace["losses"].append(losses)
        trace["crcs"].append(crc(engine))
        handle = getattr(engine, "gradprune", None)
        if handle is not None and handle.report is not None:
            trace["reports"].append(as_json(handle.report))
        if on_step is not None:
            on_step(step)
    return trace


def crc(engine: Any) -> int:
    """crc32c over all parameters' bits."""
    import google_crc32c

    value = 0
    for parameter in engine.module.parameters():
        value = google_crc32c.extend(
            value, parameter.detach().contiguous().view(-1).view(torch.uint8).numpy()
        )
    return int(value)


def train(
    *, block: dict[str, Any] | None, steps: int = 12, way: str = "initialize", **options: Any
) -> dict[str, Any]:
    """Train and return the trace."""
    engine = make_engine(block, way, **options)
    trace: dict[str, Any] = run_steps(engine, 1, steps)
    handle = getattr(engine, "gradprune", None)
    trace["residual_bytes"] = None if handle is None or handle.idle else handle.held_bytes
    return trace


def run_all(cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Run many cases one after the other: starting DeepSpeed costs more than most of them.

    Args:
        cases: name -> (function of this module, ds_cases or island_cases, its arguments).

    Returns:
        name -> result, or the text of what went wrong. A failure ends the list: the ranks may no
        longer be in step.
    """
    from deepspeed.comm import comm

    from tests.helpers import ds_cases, island_cases

    results: dict[str, Any] = {}
    start_deepspeed()
    for name, (function, arguments) in cases.items():
        adopted = getattr(comm.cdb, "_adopted", None)
        comm.cdb = comm.cdb if adopted is None else adopted  # each case starts untouched
        try:
            home = ds_cases if hasattr(ds_cases, function) else island_cases
            run = train if function == "train" else getattr(home, function)
            results[name] = run(**arguments)
        except Exception:
            results[name] = traceback.format_exc()
            break
    return results
