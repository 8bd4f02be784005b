"""An optimizer's state without the weights: moments, step counts, hyperparameters, loss scale.

DeepSpeed's own files hold the state of island 0 alone, together with its weights. Every rank saves
its own beside them. All functions are local.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ds_gradprune.errors import CheckpointError


def state_of(optimizer: Any, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The state of a `torch.optim.Optimizer`.

    Args:
        optimizer: the optimizer that DeepSpeed's wraps, or has in its place.
        tensors: what it steps, in a fixed order.

    Returns:
        "moments": a mapping per tensor, the optimizer's own tensors in it. "groups": the
        hyperparameters of each parameter group.
    """
    return {
        "moments": [dict(optimizer.state.get(tensor, {})) for tensor in tensors],
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
    }


@torch.no_grad()
def load_state(optimizer: Any, tensors: Sequence[torch.Tensor], saved: Mapping[str, Any]) -> None:
    """Take over what `state_of` gave; tensors that are there already keep their memory.

    Raises:
        CheckpointError: the state is of other tensors; nothing has changed then.
    """
    _check(optimizer, tensors, saved)
    for tensor, moments in zip(tensors, saved["moments"], strict=True):
        if not moments and tensor not in optimizer.state:
            continue  # never stepped, here as there
        current = optimizer.state[tensor]
        for key in [key for key in current if key not in moments]:
            del current[key]
        for key, value in moments.items():
            _put(current, key, value, tensor)
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(values)


def scaler_of(optimizer: Any) -> dict[str, Any]:
    """The loss scaling of one of DeepSpeed's optimizers: its numbers."""
    scaler = _scaler(optimizer)
    plain = {} if scaler is None else vars(scaler)
    return {key: value for key, value in plain.items() if type(value) in (bool, int, float)}


def load_scaler(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Take over what `scaler_of` gave."""
    for key, value in saved.items():
        setattr(_scaler(optimizer), key, value)


def _scaler(optimizer: Any) -> Any:
    for name in ("loss_scale_config", "loss_scaler"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    return None


def _check(optimizer: Any, tensors: Sequence[torch.Tensor], saved: Mapping[str, Any]) -> None:
    counts = len(saved["moments"]), len(saved["groups"])
    expected = len(tensors), len(optimizer.param_groups)
    if counts != expected:
        raise CheckpointError(
            f"the checkpoint's optimizer has {counts[0]} tensors in {counts[1]} groups, this one "
            f"{expected[0]} in {expected[1]}. Resume with the model, the parameter groups and the "
            "ZeRO stage that saved it."
        )
    for tensor, moments in zip(tensors, saved["moments"], strict=True):
        for key, value in moments.items():
            present = optimizer.state.get(tensor, {}).get(key)
            if torch.is_tensor(value) and value.dim():
                numel = present.numel() if torch.is_tensor(present) else value.numel()
                if value.numel() != numel:
                    raise CheckpointError(
                        f"the checkpoint's {key} has {value.numel()} elements, this optimizer's "
                        f"{numel}. Resume with as many ranks per island as saved it."
                    )


def _put(current: dict[str, Any], key: str, value: Any, tensor: torch.Tensor) -> None:
    if not torch.is_tensor(value):
        current[key] = value
        return
    present = current.get(key)
    if torch.is_tensor(present) and present.shape == value.shape and present.dtype == value.dtype:
        present.copy_(value)
    else:  # a step count stays on the CPU, where torch keeps it
        current[key] = value.detach().clone().to(tensor.device if value.dim() else value.device)
