"""The loss of a step: the mean over the micro-steps that were made, whatever their number.

Callers scale losses in three ways, and all are to give the same figure:

- DeepSpeed divides by `gradient_accumulation_steps`: the mean over the backward calls up to a
  boundary. An epoch's last step may have fewer.
- The caller divides (`scale_wrt_gas=False`, as the Hugging Face Trainer does): the sum.
- `managed_gradient_accumulation: false`: the caller may divide or not. The mean of the losses that
  the model itself returned is asked for; where it returned none, the mean of those given.

Several boundaries in one step (two backward calls of partial losses) add up. Losses stay on their
device until they are asked for. All functions are local.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class StepLosses:
    """The losses of the step under way, and of the steps since the last exchange."""

    def __init__(self) -> None:
        self._forward: list[torch.Tensor] = []
        self._managed: list[torch.Tensor] = []
        self._summed: list[torch.Tensor] = []
        self._given: list[torch.Tensor] = []
        self._groups: list[torch.Tensor] = []
        self._steps: list[float | None] = []

    def forward(self, output: Any) -> None:
        """The model returned this in a training forward."""
        loss = scalar_of(output)
        if loss is not None:
            self._forward.append(loss.detach().float())

    def backward(self, loss: torch.Tensor, *, is_managed: bool, is_scaled_by_us: bool) -> None:
        """`engine.backward` was called.

        Args:
            loss: what it was given.
            is_managed: DeepSpeed counts the micro-steps.
            is_scaled_by_us: DeepSpeed divides the loss by the number of micro-steps.
        """
        part = loss.detach().float()
        if not is_managed:
            self._given.append(part)
        elif is_scaled_by_us:
            self._managed.append(part)
        else:
            self._summed.append(part)

    def close_group(self) -> None:
        """Gradients are reduced: the micro-steps so far belong together."""
        parts = []
        if self._managed:
            parts.append(torch.stack(self._managed).mean())
        parts += self._summed
        if parts:
            self._groups.append(torch.stack(parts).sum())
        self._managed, self._summed = [], []

    def so_far(self) -> float | None:
        """The loss of the step under way; None: unknown."""
        self.close_group()
        if self._groups:
            return float(torch.stack(self._groups).sum())
        direct = self._forward or self._given
        return float(torch.stack(direct).mean()) if direct else None

    def end_step(self) -> None:
        """The optimizer has stepped."""
        self._steps.append(self.so_far())
        self._forget_step()

    def take(self) -> float | None:
        """Mean over the steps that have ended since the last call; None if one is unknown."""
        steps, self._steps = self._steps, []
        known = [loss for loss in steps if loss is not None]
        return sum(known) / len(known) if known and len(known) == len(steps) else None

    def reset(self) -> None:
        """Forget everything."""
        self._forget_step()
        self._steps = []

    def state_dict(self) -> list[float | None]:
        """Losses of the steps since the last exchange."""
        return self._steps

    def load_state_dict(self, state: list[float | None]) -> None:
        """Take over what `state_dict` gave."""
        self.reset()
        self._steps = [None if loss is None else float(loss) for loss in state]

    def _forget_step(self) -> None:
        self._forward, self._managed, self._summed = [], [], []
        self._given, self._groups = [], []


def scalar_of(output: Any) -> torch.Tensor | None:
    """The loss in what a model returned: itself, its `loss`, or its first element; None: none."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif isinstance(output, (tuple, list)):
        output = output[0] if output else None
    elif not isinstance(output, torch.Tensor):
        output = getattr(output, "loss", None)
    is_loss = isinstance(output, torch.Tensor) and output.numel() == 1
    return output.reshape(()) if is_loss and output.is_floating_point() else None
