"""Engines as users make them, on the accelerator that is there; their data, weights and memory.

Two ranks may share one device: each has local rank 0, so each counts as a host and as an island.
"""

from __future__ import annotations

import datetime
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
GROUP_TIMEOUT_S = 60
"""A rank that is gone is noticed so soon."""

SGD: dict[str, Any] = {
    "optimizer": {"type": "SGD", "params": {"lr": 0.02}},
    "gradient_clipping": 0.0,
}
PRUNED: dict[str, Any] = {
    "prune": "update",
    "warmup_steps": 2,
    "ramp_steps": 0,
    "window_size": 4,
    "timeout_s": GROUP_TIMEOUT_S,
    "verify_every_steps": 1,
    "density": {"initial": 0.01, "min": 0.01, "max": 0.01},
}
DENSE: dict[str, Any] = PRUNED | {
    "warmup_steps": 0,
    "density": {"initial": 1.0, "min": 1.0, "max": 1.0},
    "value_bits": 32,
    "update_scale": 1.0,
}


def start(backend: str = "gloo") -> None:
    """Open DeepSpeed's communication. Collective: all ranks.

    Args:
        backend: "gloo", because nccl refuses two ranks on one device; "nccl" as users have it.
    """
    import deepspeed

    torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // 2)))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
    if backend == "gloo":
        # Not DeepSpeed's way: it would bind the group to a device, which is nccl's business.
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=GROUP_TIMEOUT_S))
    deepspeed.init_distributed(
        backend, timeout=datetime.timedelta(seconds=GROUP_TIMEOUT_S), verbose=False
    )


def device() -> torch.device:
    """Where the ranks compute."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- models and data -----------------------------------------------------------------------------


def gpt2(width: int, layers: int, heads: int, vocab: int, context: int) -> Any:
    """An untrained GPT-2 shape, equal on all ranks.

    Attention is written out: the fused one sums in another order from call to call, and two runs
    must be comparable bit by bit where the model is small.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager" if width <= 128 else "sdpa",
    )
    return GPT2LMHeadModel(config)


def small() -> Any:
    """0.2M parameters: seconds for any check."""
    return gpt2(64, 2, 2, 256, 64)


def smollm2(scale: int = 1) -> Any:
    """The shape of SmolLM2-135M-Instruct with random weights; its own are too large to bring."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152 // scale,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30 // scale,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def text() -> torch.Tensor:
    """This repository's own source as bytes: a text that is there wherever the check is."""
    files = sorted(ROOT.glob("ds_gradprune/**/*.py")) + sorted(ROOT.glob("docs/*.md"))
    data = b"".join(path.read_bytes() for path in files)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def batch(source: torch.Tensor, seed: int, rows: int, length: int) -> torch.Tensor:
    """(rows, length) tokens from random places."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(source) - length, (rows,), generator=generator)
    return torch.stack([source[i : i + length] for i in starts.tolist()]).to(device())


# ---- engines -------------------------------------------------------------------------------------


@dataclass
class Job:
    """What is trained, and how.

    Attributes:
        model: makes it.
        stage: of ZeRO.
        dtype: fp32, bf16 or fp16.
        rows: sequences of a rank per step.
        length: tokens of each.
        extra: further keys of the DeepSpeed configuration.
    """

    model: Callable[[], Any] = small
    stage: int = 0
    dtype: str = "fp32"
    rows: int = 4
    length: int = 32
    extra: dict[str, Any] = field(default_factory=dict)

    def config(self, block: dict[str, Any] | None) -> dict[str, Any]:
        """The DeepSpeed configuration; nothing in it makes DeepSpeed compile."""
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.rows,
            "gradient_accumulation_steps": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "steps_per_print": None,
            "zero_optimization": {"stage": self.stage},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
        if self.dtype == "bf16":
            config["bf16"] = {"enabled": True}
        if self.dtype == "fp16":
            config["fp16"] = {"enabled": True, "initial_scale_power": 8}
        zero = config["zero_optimization"] | self.extra.get("zero_optimization", {})
        config |= self.extra | {"zero_optimization": zero}
        return config if block is None else config | {"gradient_pruning": block}

    def engine(self, block: dict[str, Any] | None) -> Any:
        """An engine; block None: plain DeepSpeed over all ranks. Collective: all ranks."""
        import deepspeed

        import ds_gradprune

        model = self.model()
        initialize = deepspeed.initialize if block is None else ds_gradprune.initialize
        return initialize(
            model=model, model_parameters=list(model.parameters()), config=self.config(block)
        )[0]


def close(engine: Any) -> None:
    """Give back hooks and memory."""
    handle = getattr(engine, "gradprune", None)
    if handle is not None and not handle.idle:
        handle.detach()
    engine.destroy()
    del engine, handle
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step(engine: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Forward, backward, step; the loss, still on its device."""
    loss: torch.Tensor = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def train(
    engine: Any,
    job: Job,
    source: torch.Tensor,
    first: int,
    last: int,
    on_step: Callable[[float], None] | None = None,
) -> list[float]:
    """Steps first .. last on this rank's own data; the losses. Collective: all ranks.

    Args:
        engine: an engine.
        job: says the size of a batch.
        source: the text.
        first: from 1.
        last: the last one.
        on_step: called after each with its seconds.
    """
    losses = []
    for number in range(first, last + 1):
        tokens = batch(source, 1000 * number + dist.get_rank(), job.rows, job.length)
        synchronize()
        began_s = time.perf_counter()
        loss = step(engine, tokens)
        synchronize()
        if on_step is not None:
            on_step(time.perf_counter() - began_s)
        losses.append(float(loss))
    return losses


def everywhere(value: Any) -> list[Any]:
    """Every rank's value. Collective: all ranks."""
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, value)
    return answers


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """The model's own, whole, on the CPU, whatever the stage. Collective: all ranks."""
    import deepspeed

    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().cpu().clone() for name, p in named.items()}


def median(values: list[float]) -> float | None:
    """None where there is none."""
    return statistics.median(values) if values else None
