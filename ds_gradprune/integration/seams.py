"""What we touch of DeepSpeed, checked by name before anything is changed.

Every name and signature below was read in deepspeed 0.19.8 (runtime/engine.py, comm/comm.py,
comm/torch.py). A version that lacks one is refused with one sentence, and so is every feature whose
gradients would take another way than the one we prune.
"""

from __future__ import annotations

import inspect
from typing import Any

import deepspeed
import torch

from ds_gradprune.config import BLOCK
from ds_gradprune.errors import UnsupportedError

TESTED_VERSIONS = ("0.19.8",)
"""DeepSpeed versions that the tests ran with."""

_SIGNATURES: dict[str, tuple[str, ...] | None] = {
    "allreduce_bucket": ("bucket", "dp_group", "dp_world_size"),
    "buffered_allreduce_fallback": ("grads", "elements_per_buffer"),
    "_get_gradients_for_reduction": (),
    "backward": None,  # a decorator hides its signature
    "step": ("lr_kwargs",),
    "save_checkpoint": (
        "save_dir",
        "tag",
        "client_state",
        "save_latest",
        "exclude_frozen_parameters",
    ),
    "load_checkpoint": (
        "load_dir",
        "tag",
        "load_module_strict",
        "load_optimizer_states",
        "load_lr_scheduler_states",
        "load_module_only",
        "custom_load_fn",
    ),
    "gradient_accumulation_steps": (),
    "zero_optimization_stage": (),
    "fp16_enabled": (),
}

_ATTRIBUTES = (
    "config",
    "device",
    "lr_scheduler",
    "module",
    "mpu",
    "optimizer",
    "monitor",
    "global_steps",
    "global_samples",
    "enable_backward_allreduce",
    "pipeline_parallelism",
    "skipped_steps",
    "has_moe_layers",
    "seq_data_parallel_group",
    "sequence_parallel_size",
    "mp_world_size",
    "torch_autocast_z0_gradscaler",
)


def check(engine: Any, prune: str) -> None:
    """Refuse, by name, an engine that we cannot serve. Local.

    Args:
        engine: what `deepspeed.initialize` returned first.
        prune: "gradient" or "update".

    Raises:
        UnsupportedError: lists everything that stands in the way.
    """
    missing = _missing(engine)
    if missing:
        raise UnsupportedError(
            f"deepspeed {deepspeed.__version__} lacks {', '.join(missing)}, which gradient pruning "
            f"hooks into; tested with {', '.join(TESTED_VERSIONS)}"
        )
    refused = _refused(engine)
    if prune == "update" and engine.fp16_enabled():
        refused.append('fp16 with prune = "update" yet (fp32 and bf16 only; "gradient" takes it)')
    if refused:
        hint = f"Change it, or set {BLOCK}.enabled to false to train without pruning."
        raise UnsupportedError(f"gradient pruning does not support {'; '.join(refused)}. {hint}")


def _missing(engine: Any) -> list[str]:
    missing = [f"DeepSpeedEngine.{name}" for name in _ATTRIBUTES if not hasattr(engine, name)]
    for name, expected in _SIGNATURES.items():
        method = getattr(type(engine), name, None)
        if method is None:
            missing.append(f"DeepSpeedEngine.{name}")
            continue
        found = tuple(inspect.signature(method).parameters)[1:]
        if expected is not None and found != expected:
            missing.append(f"DeepSpeedEngine.{name}({', '.join(expected)})")
    return missing


def _refused(engine: Any) -> list[str]:
    stage = int(engine.zero_optimization_stage())
    checks = {
        f"zero_optimization.stage {stage} yet (only stage 0)": stage != 0,
        "pipeline parallelism yet": engine.pipeline_parallelism,
        "mixture of experts": engine.has_moe_layers,
        "sequence parallelism": engine.sequence_parallel_size > 1,
        "tensor parallelism": engine.mp_world_size > 1,
        "an engine without optimizer": engine.optimizer is None,
        "fp16 under torch_autocast": engine.torch_autocast_z0_gradscaler is not None,
        "engine.enable_backward_allreduce = False": not engine.enable_backward_allreduce,
        "DeepCompile": _calls_true(engine, "is_deepcompile_enabled"),
        "the hybrid engine": type(engine).__name__ == "DeepSpeedHybridEngine",
        "nn.Embedding(sparse=True)": any(
            isinstance(module, torch.nn.Embedding) and module.sparse
            for module in engine.module.modules()
        ),
        "an engine that is attached already": hasattr(engine, "gradprune")
        and engine.gradprune is not None,
    }
    return [name for name, is_present in checks.items() if is_present]


def _calls_true(engine: Any, name: str) -> bool:
    method = getattr(engine, name, None)
    return bool(method()) if callable(method) else False
