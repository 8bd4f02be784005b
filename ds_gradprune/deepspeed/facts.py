"""What of an engine must be equal on all ranks, read before its first step."""

from __future__ import annotations

import json
import logging
import numbers
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

import ds_gradprune
from ds_gradprune.codec.header import VERSION as WIRE_FORMAT
from ds_gradprune.config import BLOCK, GradientPruningConfig
from ds_gradprune.deepspeed.agree import Facts
from ds_gradprune.law import fingerprint

logger = logging.getLogger(__name__)


def facts_before(config: GradientPruningConfig, model: torch.nn.Module, optimizer: Any) -> Facts:
    """What can be compared before DeepSpeed makes an engine, and would hang there if it differs.

    Ranks with other models wait for each other in DeepSpeed's broadcasts until its time-out of 30
    minutes. Local.

    Args:
        config: the validated block.
        model: what `deepspeed.initialize` is given.
        optimizer: the same; None: it stands in the DeepSpeed configuration.
    """
    values = _versions() | _block(config) | {"optimizer": type(optimizer).__name__}
    return Facts(values, {"parameter": [*_parameters(model)]})


def facts_of(engine: Any, config: GradientPruningConfig) -> Facts:
    """Versions, configuration, model, optimizer and batches of this rank. Local.

    The seed and the data cannot be seen here, and functions (a schedule's, say) cannot be compared.

    Args:
        engine: a DeepSpeed engine with an optimizer.
        config: the validated block; `log_path` may differ, because only rank 0 uses it.
    """
    values = _versions() | _block(config) | _training(engine)
    values |= dict(_optimizer(engine)) | dict(_schedule(engine.lr_scheduler))
    return Facts(values, {"parameter": [*_parameters(engine.module)]})


def tell_changes(before: Mapping[str, str] | None, now: Mapping[str, str]) -> None:
    """Say what is other than in the run that saved a checkpoint: all of it is accepted. Local.

    Args:
        before: values of the facts then; None: it did not save them.
        now: values of the facts of the run that goes on.
    """
    if before is None:
        return
    names = sorted(name for name in now if before.get(name) != now[name])
    changes = [f"{name} was {before.get(name)}, is {now[name]}" for name in names]
    if changes:
        logger.warning(
            "the checkpoint was saved with other settings: %s. The block's hold from now on; the "
            "learning rate and other numbers of the optimizer are the checkpoint's",
            "; ".join(changes),
        )


def _versions() -> dict[str, str]:
    return {
        "ds_gradprune": ds_gradprune.__version__,
        "wire format": str(WIRE_FORMAT),
        "deepspeed": str(deepspeed.__version__),
        "torch": torch.__version__.split("+")[0],
        "numpy": np.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "law arithmetic": fingerprint(),
    }


def _block(config: GradientPruningConfig) -> dict[str, str]:
    return dict(_flat(BLOCK, config.model_dump(mode="json", exclude={"log_path"})))


def _training(engine: Any) -> dict[str, str]:
    precision = "bf16" if engine.bfloat16_enabled() else "fp32"
    precision = "fp16" if engine.fp16_enabled() else precision
    if engine.torch_autocast_enabled():
        precision += f" with torch_autocast {engine.torch_autocast_dtype()}"
    return {
        "accelerator": get_accelerator().device_name(),  # decides how an exchange is cut
        "zero_optimization.stage": str(int(engine.zero_optimization_stage())),
        "precision": precision,
        "train_micro_batch_size_per_gpu": str(engine.train_micro_batch_size_per_gpu()),
        "gradient_accumulation_steps": str(engine.gradient_accumulation_steps()),
        "gradient_clipping": _plain(engine.gradient_clipping()),
        "lr_scheduler": type(engine.lr_scheduler).__name__,
    }


def _optimizer(engine: Any) -> Iterator[tuple[str, str]]:
    """Class and hyper-parameters; the learning rates are those of now."""
    optimizer = engine.basic_optimizer
    yield "optimizer", type(optimizer).__name__
    for index, group in enumerate(optimizer.param_groups):
        for name in sorted(group, key=str):
            if name != "params":
                yield f"optimizer.param_groups[{index}].{name}", _plain(group[name])


def _schedule(scheduler: Any) -> Iterator[tuple[str, str]]:
    """The plain numbers of a schedule; its functions cannot be compared."""
    for name in sorted(vars(scheduler)) if hasattr(scheduler, "__dict__") else ():
        value = vars(scheduler)[name]
        if isinstance(value, (bool, int, float, str, list, tuple)):
            yield f"lr_scheduler.{name}", _plain(value)


def _parameters(module: torch.nn.Module) -> Iterator[str]:
    """One line per parameter. At ZeRO stage 3 the tensor is empty, and `ds_shape` is its shape."""
    for name, parameter in module.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        trained = "trained" if parameter.requires_grad else "frozen"
        yield f"{name} {str(parameter.dtype).removeprefix('torch.')} {shape} {trained}"


def _flat(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{path}.{key}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _flat(f"{path}[{index}]", item)
    else:
        yield path, _plain(value)


def _plain(value: Any) -> str:
    """Text that is equal where the value is: 1 is 1.0 is numpy's and torch's."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return f"{number:g}" if float(f"{number:g}") == number else repr(number)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(value[key])}" for key in sorted(value, key=str))
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_plain(item) for item in value) + ")"
    return f"a {type(value).__name__}"
