"""Where an engine keeps the fp32 weights that its optimizer steps (deepspeed 0.19.8, ZeRO stage 0).

- fp32: the optimizer is the user's own, and its parameters are the model's.
- bf16, FusedAdam: `FP16_Optimizer` has one flat fp32 tensor for every parameter group.
- bf16, anything else: `FP16_UnfusedOptimizer` has one fp32 tensor for every parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from ds_gradprune.errors import UnsupportedError

_COPIES = ("fp32_groups", "fp32_groups_flat")
"""What the bf16 optimizers put beside the moments into their state: the fp32 weights."""


class Masters:
    """The fp32 weights of one engine.

    Args:
        engine: a DeepSpeed engine, ZeRO stage 0, fp32 or bf16.

    Raises:
        UnsupportedError: they are not where we know them to be, or not fp32.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        optimizer = engine.optimizer
        self._pairs: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]
        if isinstance(optimizer, FP16_UnfusedOptimizer):
            self._pairs = self._unfused
        elif isinstance(optimizer, FP16_Optimizer):
            self._pairs = self._fused
        elif isinstance(optimizer, torch.optim.Optimizer):
            self._pairs = self._plain
        else:
            raise UnsupportedError(
                f'prune = "update" does not know where {type(optimizer).__name__} keeps its fp32 '
                'weights. Take another optimizer, or set prune to "gradient".'
            )
        for tensor in self.tensors():
            if tensor.dtype is not torch.float32:
                raise UnsupportedError(
                    'prune = "update" needs float32 weights in the optimizer, got '
                    f"{tensor.dtype}. Set bf16.enabled to train a bf16 model."
                )

    def tensors(self) -> list[torch.Tensor]:
        """The fp32 weights, in the optimizer's order; never the same memory twice. Local."""
        return [master for master, _ in self._pairs() if master.numel()]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the fp32 weights into the model, where it has its own. Local."""
        for master, parameter in self._pairs():
            if parameter is not master:
                parameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state without the weights. Local."""
        state = self._engine.optimizer.state_dict()
        return {key: value for key, value in state.items() if key not in _COPIES}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; the weights stay. Local."""
        optimizer = self._engine.optimizer
        weights = {key: getattr(optimizer, key) for key in _COPIES if hasattr(optimizer, key)}
        optimizer.load_state_dict(state | weights)

    def _plain(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for group in self._engine.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield parameter, parameter

    def _unfused(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        optimizer = self._engine.optimizer
        for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            yield from zip(masters, parameters, strict=True)

    def _fused(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        optimizer = self._engine.optimizer
        groups = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
        for flat, parameters in groups:
            parts = torch.split(flat, [parameter.numel() for parameter in parameters])
            for part, parameter in zip(parts, parameters, strict=True):
                yield part.view(parameter.shape), parameter
