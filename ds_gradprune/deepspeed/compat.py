"""What we touch of DeepSpeed, checked by name before anything is changed.

Every name and signature below was read in deepspeed 0.19.8 (runtime/engine.py, runtime/zero/,
runtime/fp16/, runtime/bf16_optimizer.py, comm/comm.py, utils/groups.py). A version that lacks one
is refused with one sentence. All functions are local.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed

from ds_gradprune.config import BLOCK
from ds_gradprune.deepspeed.refusals import GRADIENT, UPDATE, refusals
from ds_gradprune.errors import UnsupportedError

TESTED_VERSIONS = ("0.19.8",)
"""DeepSpeed versions that the tests ran with."""


@dataclass(frozen=True)
class Names:
    """What must be there.

    Attributes:
        attributes: of the engine.
        methods: of the engine's class, with the names of their parameters; None: not compared,
            where a decorator hides them.
        modules: module -> names in it.
    """

    attributes: tuple[str, ...] = ()
    methods: Mapping[str, tuple[str, ...] | None] | None = None
    modules: Mapping[str, tuple[str, ...]] | None = None


_EVERYWHERE = Names(
    attributes=(
        "basic_optimizer",
        "config",
        "device",
        "enable_backward_allreduce",
        "global_samples",
        "global_steps",
        "gradient_average",
        "has_moe_layers",
        "inside_no_sync_ctxt",
        "lr_scheduler",
        "module",
        "monitor",
        "mpu",
        "mp_world_size",
        "optimizer",
        "pipeline_parallelism",
        "save_non_zero_checkpoint",
        "seq_data_parallel_group",
        "sequence_parallel_size",
        "skipped_steps",
        "torch_autocast_z0_gradscaler",
        "_step_applied",
    ),
    methods={
        "backward": None,
        "bfloat16_enabled": (),
        "fp16_enabled": (),
        "gradient_accumulation_steps": (),
        "gradient_clipping": (),
        "is_gradient_accumulation_boundary": (),
        "managed_gradient_accumulation": (),
        "torch_autocast_enabled": (),
        "torch_autocast_dtype": (),
        "train_micro_batch_size_per_gpu": (),
        "zero_optimization_stage": (),
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
    },
)
_STAGE_0 = Names(
    methods={
        "allreduce_bucket": ("bucket", "dp_group", "dp_world_size"),
        "buffered_allreduce_fallback": ("grads", "elements_per_buffer"),
        "_get_gradients_for_reduction": (),
        "_get_optimizer_loss_scale": (),
    },
    modules={"deepspeed.comm.comm": ("cdb",), "deepspeed.comm.torch": ("TorchBackend",)},
)
_ISLANDS = Names(
    attributes=("param_names", "save_zero_checkpoint"),
    methods={"zero_optimization_partition_weights": ()},
    modules={"deepspeed.utils.groups": ("mpu", "_clone_world_group")},
)
_STAGES_1_TO_3 = Names(methods={"_take_model_step": ("lr_kwargs",)})
_STAGE_3 = Names(
    methods={"_zero3_consolidated_16bit_state_dict": ("exclude_frozen_parameters",)},
    modules={
        "deepspeed.runtime.zero.partitioned_param_coordinator": ("assert_ints_same_as_other_ranks",)
    },
)

TABLES: dict[tuple[str, int], tuple[Names, ...]] = {
    (GRADIENT, 0): (_EVERYWHERE, _STAGE_0),
    (GRADIENT, 1): (_EVERYWHERE, _STAGE_0),
    (GRADIENT, 2): (_EVERYWHERE, _STAGE_0),
    (UPDATE, 0): (_EVERYWHERE, _ISLANDS, _STAGE_0),
    (UPDATE, 1): (_EVERYWHERE, _ISLANDS, _STAGES_1_TO_3),
    (UPDATE, 2): (_EVERYWHERE, _ISLANDS, _STAGES_1_TO_3),
    (UPDATE, 3): (_EVERYWHERE, _ISLANDS, _STAGES_1_TO_3, _STAGE_3),
}
"""Mode and ZeRO stage -> what must be there. A pair that is missing is not supported."""

OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "FP16_Optimizer": ("optimizer", "fp16_groups", "fp32_groups_flat", "refresh_fp32_params"),
    "FP16_UnfusedOptimizer": ("optimizer", "fp16_groups", "fp32_groups", "refresh_fp32_params"),
    "BF16_Optimizer": (
        "optimizer",
        "bf16_groups",
        "fp32_groups_flat_partition",
        "update_lp_params",
    ),
    "DeepSpeedZeroOptimizer": (
        "optimizer",
        "averaged_gradients",
        "cpu_offload",
        "get_param_id",
        "round_robin_bit16_groups",
        "round_robin_bit16_meta",
        "round_robin_bit16_offsets",
        "single_partition_of_fp32_groups",
        "update_lp_params",
        "_wait_for_offload_copies",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "optimizer",
        "averaged_gradients",
        "fp16_groups",
        "fp16_partitioned_groups_flat",
        "fp32_partitioned_groups_flat",
        "get_param_id",
        "offload_optimizer",
        "parameter_offload",
        "_constant_buffered_norm2",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
}
"""With update: class of DeepSpeed's optimizer -> the attributes that say where the weights lie."""

OFFLOADED: dict[str, tuple[str, tuple[str, ...]]] = {
    "DeepSpeedZeroOptimizer": ("cpu_offload", ("local_overflow", "norm_for_param_grads")),
    "DeepSpeedZeroOptimizer_Stage3": ("offload_optimizer", ("norm_for_param_grads",)),
}
"""The same where the optimizer is offloaded: the attribute that says so, and what more it has."""

REDUCERS: dict[str, tuple[tuple[str, ...], Mapping[str, tuple[str, ...]]]] = {
    "BF16_Optimizer": (
        (
            "bf16_groups",
            "bf16_groups_flat",
            "fp32_groups_gradients",
            "fp32_groups_gradients_flat",
            "param_names",
        ),
        {"get_grads_for_reduction": ()},
    ),
    "DeepSpeedZeroOptimizer": (
        ("bit16_groups_flat", "ipg_buckets", "param_dict", "param_names"),
        {
            "allreduce_bucket": (
                "bucket",
                "communication_data_type",
                "rank",
                "log",
                "divide",
                "process_group",
            ),
            "gradient_reduction_w_predivide": ("tensor", "communication_data_type"),
            "overlapping_partition_gradients_reduce_epilogue": (),
            "reduce_ipg_grads": ("comm_dtype",),
        },
    ),
}
"""With gradient: class of DeepSpeed's optimizer -> attributes and methods that we reduce with."""


def has_optimizer(engine: Any) -> bool:
    """Whether an engine trains. One that does not, a reference model's, is left alone."""
    return getattr(engine, "basic_optimizer", None) is not None


def check_stage(prune: str, stage: int) -> None:
    """Raise UnsupportedError where this ZeRO stage is not supported; needs no engine."""
    if (prune, stage) not in TABLES:
        stages = ", ".join(str(known) for mode, known in TABLES if mode == prune)
        raise UnsupportedError(
            f'gradient pruning does not support zero_optimization.stage {stage} with prune = "'
            f'{prune}" (stages that it takes: {stages}). Set {BLOCK}.prune to "update", or another '
            "stage."
        )


def check(engine: Any, prune: str) -> None:
    """Refuse, by name, an engine that we cannot serve.

    Args:
        engine: what `deepspeed.initialize` returned first; it has an optimizer.
        prune: "gradient" or "update".

    Raises:
        UnsupportedError: lists everything that stands in the way.
    """
    check_stage(prune, stage := int(engine.zero_optimization_stage()))
    missing = [name for table in TABLES[prune, stage] for name in _missing(engine, table)]
    if prune == UPDATE:
        missing += _missing_of_optimizer(engine.optimizer)
    else:
        missing += _missing_of_reducer(engine.optimizer)
    if missing:
        raise UnsupportedError(
            f"deepspeed {deepspeed.__version__} lacks {', '.join(missing)}, which gradient pruning "
            f"hooks into. Install a version it was tested with: {', '.join(TESTED_VERSIONS)}."
        )
    refused = refusals(engine, prune)
    if refused:
        raise UnsupportedError(
            f"gradient pruning does not support {'; '.join(refused)}. Change it, or set "
            f"{BLOCK}.enabled to false to train without pruning."
        )


def _missing(engine: Any, names: Names) -> Iterator[str]:
    for name in names.attributes:
        if not _has_own(engine, name):
            yield f"DeepSpeedEngine.{name}"
    for name, expected in (names.methods or {}).items():
        method = getattr(type(engine), name, None)
        if method is None:
            yield f"DeepSpeedEngine.{name}"
        elif expected is not None and _parameters(method) != expected:
            yield f"DeepSpeedEngine.{name}({', '.join(expected)})"
    for module, members in (names.modules or {}).items():
        for name in members:
            if not _is_in(module, name):
                yield f"{module}.{name}"


def _missing_of_optimizer(optimizer: Any) -> Iterator[str]:
    kind = type(optimizer).__name__
    flag, more = OFFLOADED.get(kind, ("", ()))
    is_offloaded = bool(getattr(optimizer, flag, False)) if flag else False
    for name in OPTIMIZERS.get(kind, ()) + (more if is_offloaded else ()):
        if not hasattr(optimizer, name):
            yield f"{kind}.{name}"


def _missing_of_reducer(optimizer: Any) -> Iterator[str]:
    kind = type(optimizer).__name__
    attributes, methods = REDUCERS.get(kind, ((), {}))
    for name in attributes:
        if not hasattr(optimizer, name):
            yield f"{kind}.{name}"
    for name, expected in methods.items():
        method = getattr(type(optimizer), name, None)
        if method is None or _parameters(method) != expected:
            yield f"{kind}.{name}({', '.join(expected)})"


def _has_own(engine: Any, name: str) -> bool:
    """Whether the engine has it; what it has not, DeepSpeed takes from the user's model."""
    has = name in vars(engine) or name in vars(engine).get("_modules", {})
    return has or hasattr(type(engine), name)


def _parameters(method: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(method).parameters)[1:]


def _is_in(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False
