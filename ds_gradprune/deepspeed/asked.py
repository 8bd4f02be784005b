"""What a configuration and a model ask for that we refuse, seen before there is an engine.

An engine may take minutes to make: a large model is divided, an optimizer compiled. What only an
engine shows stands in `refusals`. All functions are local.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.pipe import PipelineModule

from ds_gradprune.config import BLOCK
from ds_gradprune.deepspeed.compat import check_stage
from ds_gradprune.deepspeed.refusals import UPDATE, has_modes, has_sparse_embedding
from ds_gradprune.errors import UnsupportedError

_HALF = ("torch.float16", "fp16", "float16", "half")
"""Names that DeepSpeed knows for fp16."""


def refuse_asked(given: Mapping[str, Any], ds_config: Mapping[str, Any], prune: str) -> None:
    """Refuse, by name, what would make an engine that we cannot serve.

    Args:
        given: to `deepspeed.initialize`.
        ds_config: its configuration.
        prune: "gradient" or "update".

    Raises:
        UnsupportedError: lists everything that was found.
    """
    stage = _number(_block(ds_config, "zero_optimization"), "stage", 0)
    check_stage(prune, int(stage))
    found = [*_of_groups(given, ds_config), *_of_config(ds_config)]
    found += _of_model(given["model"])
    words = "does not support"
    if prune == UPDATE:
        found += ["an mpu"] if given.get("mpu") is not None else []
        found += [*refused_by(ds_config), *_of_updates(given, ds_config)]
        words = "keeps DeepSpeed inside islands and does not support"
    else:
        kept = ("tensor_parallel.", "zero_optimization.zenflow")
        found += [name for name in refused_by(ds_config) if name.startswith(kept)]
    if found:
        raise UnsupportedError(
            f'{BLOCK}.prune = "{prune}" {words} {", ".join(found)}. Leave that out.'
        )


def muon_steps_first(ds_config: Mapping[str, Any]) -> bool:
    """Whether Muon at ZeRO stages 1 and 2 would turn gradients into updates before we see them."""
    zero = _block(ds_config, "zero_optimization")
    kind = str(_block(ds_config, "optimizer").get("type", "")).lower()
    device = str(_block(zero, "offload_optimizer").get("device", "none"))
    return kind == "muon" and _number(zero, "stage", 0) in (1, 2) and device == "none"


def _of_groups(given: Mapping[str, Any], ds_config: Mapping[str, Any]) -> Iterator[str]:
    """Models that are divided, and other process groups that they bring along."""
    if isinstance(given.get("model"), PipelineModule):
        yield "a PipelineModule"
    if given.get("mesh_param") is not None:
        yield "mesh_param"
    if "sequence_parallel_size" in ds_config:
        yield "sequence_parallel_size"


def _of_config(ds_config: Mapping[str, Any]) -> Iterator[str]:
    if _block(ds_config, "compile").get("deepcompile") is True:
        yield "DeepCompile (compile.deepcompile)"
    if _block(ds_config, "hybrid_engine").get("enabled") is True:
        yield "the hybrid engine (hybrid_engine.enabled)"
    autocast = _block(ds_config, "torch_autocast")
    if autocast.get("enabled") is True and autocast.get("dtype") in _HALF:
        yield 'fp16 under torch_autocast (torch_autocast.dtype, which may be "bfloat16")'


def _of_model(model: torch.nn.Module) -> Iterator[str]:
    if any(isinstance(module, MoE) for module in model.modules()):
        yield "mixture of experts (deepspeed.moe.layer.MoE)"
    if has_sparse_embedding(model):
        yield "nn.Embedding(sparse=True)"


def _of_updates(given: Mapping[str, Any], ds_config: Mapping[str, Any]) -> Iterator[str]:
    if str(ds_config.get("gradient_allreduce_op", "")).lower() == "sum":
        yield "gradients that are summed (gradient_allreduce_op)"
    for kind in ("bf16", "fp16"):
        name = f"{kind}_master_weights_and_grads"
        if _block(ds_config, kind).get(name) is True:
            yield f"{kind}.{name} (no fp32 weights)"
    optimizer = given.get("optimizer")
    if has_modes(optimizer):
        yield (
            f"{type(optimizer).__name__} (its train() and eval() rewrite the weights: use the "
            'optimizer without them and a learning rate schedule, or prune = "gradient")'
        )


def refused_by(ds_config: Mapping[str, Any]) -> list[str]:
    """What a DeepSpeed configuration asks for and islands cannot serve, by name. Local.

    Asked before `deepspeed.initialize`: some of it would create process groups of its own there.
    """
    zero = _block(ds_config, "zero_optimization")
    curriculum = ds_config
    for name in ("data_efficiency", "data_sampling", "curriculum_learning"):
        curriculum = _block(curriculum, name)
    offloads = {name: _block(zero, name) for name in ("offload_optimizer", "offload_param")}
    checks = {
        "zero_hpz_partition_size": _number(zero, "zero_hpz_partition_size", 1) > 1,
        "mics_shard_size": _number(zero, "mics_shard_size", -1) > 0,
        "zero_quantized_weights": zero.get("zero_quantized_weights") is True,
        "zero_quantized_gradients": zero.get("zero_quantized_gradients") is True,
        "zero_quantized_nontrainable_weights": zero.get("zero_quantized_nontrainable_weights")
        is True,
        "zenflow": bool(zero.get("zenflow")),
        "enable_sanity_checks": zero.get("enable_sanity_checks") is True,
        "pipeline_loading_checkpoint": zero.get("pipeline_loading_checkpoint") is True,
        **{f"{n}.device nvme": str(o.get("device")) == "nvme" for n, o in offloads.items()},
        "offload_optimizer.ratio below 1": _number(offloads["offload_optimizer"], "ratio", 1) < 1,
        "offload_optimizer.super_offload": offloads["offload_optimizer"].get("super_offload")
        is True,
    }
    tensors = _block(ds_config, "tensor_parallel")
    found = [f"zero_optimization.{name}" for name, is_present in checks.items() if is_present]
    if curriculum.get("enabled") is True:
        found.append("data_efficiency.data_sampling.curriculum_learning")
    if _number(tensors, "autotp_size", 0) > 1:
        found.append("tensor_parallel.autotp_size")
    return found


def _block(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    block = config.get(name)
    return block if isinstance(block, Mapping) else {}


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    return value if isinstance(value, (int, float)) else default
