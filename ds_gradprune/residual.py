"""Error feedback: what was not sent is kept and added to the next gradient.

Two phases. Selecting what to send changes nothing here; only `commit`, after the exchange has
succeeded, moves the residual from e to e + g - sent. `keep` takes a gradient whose exchange failed,
so that it is not lost. All amounts are in unscaled units: a gradient under loss scaling is divided
by its scale on the way in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ds_gradprune.errors import CheckpointError


class Residual:
    """The unsent part of one bucket.

    Args:
        numel: elements of the bucket.
        device: where the bucket lives.

    Attributes:
        buffer: (numel,) float32; 4 bytes per element, allocated here and never again.
        is_zero: nothing is owed: the buffer holds only zeros.
    """

    def __init__(self, numel: int, device: torch.device | str = "cpu") -> None:
        self.buffer = torch.zeros(numel, dtype=torch.float32, device=device)
        self.is_zero = True

    def commit(
        self,
        gradient: torch.Tensor,
        positions: torch.Tensor,
        sent: torch.Tensor,
        scale: float = 1.0,
    ) -> None:
        """The exchange succeeded: e becomes e + g - sent.

        Args:
            gradient: (numel,) floating point, in scaled units, as it was before the exchange.
            positions: (num_sent,) int64, distinct positions of the elements that were sent.
            sent: (num_sent,) float32, exactly what every receiver decoded, in scaled units.
            scale: loss scale of `gradient`.
        """
        self.keep(gradient, scale)
        self.buffer.index_add_(0, positions, sent, alpha=-1.0 / scale)

    def put_back(self, positions: torch.Tensor, sent: torch.Tensor, scale: float = 1.0) -> None:
        """What was committed as sent had no effect (the sum overflowed): owe it again."""
        self.buffer.index_add_(0, positions, sent, alpha=1.0 / scale)

    def keep(self, gradient: torch.Tensor, scale: float = 1.0) -> None:
        """Nothing of `gradient` was sent: e becomes e + g."""
        self.buffer.add_(gradient, alpha=1.0 / scale)
        self.is_zero = False

    def add_to(self, gradient: torch.Tensor, scale: float = 1.0) -> None:
        """Pay everything owed into `gradient`, in place; e itself is cleared by `clear`."""
        gradient.add_(self.buffer, alpha=scale)

    def clear(self) -> None:
        """Everything owed has been sent."""
        self.buffer.zero_()
        self.is_zero = True


class ResidualStore:
    """The residuals of all buckets of one rank, allocated when a bucket is first seen."""

    def __init__(self) -> None:
        self._residuals: dict[int, Residual] = {}

    def of(self, bucket: int, like: torch.Tensor) -> Residual:
        """The residual of `bucket`, whose gradients look like `like`. Local."""
        residual = self._residuals.get(bucket)
        if residual is None:
            residual = self._residuals[bucket] = Residual(like.numel(), like.device)
        elif residual.buffer.numel() != like.numel():
            raise CheckpointError(
                f"bucket {bucket} has {like.numel()} elements, but its residual has "
                f"{residual.buffer.numel()}: the model or the checkpoint is another one"
            )
        elif residual.buffer.device != like.device:
            residual.buffer = residual.buffer.to(like.device)
        return residual

    def norm(self) -> float:
        """2-norm over all buckets."""
        return float(sum(float(r.buffer.norm()) ** 2 for r in self._residuals.values()) ** 0.5)

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(r.buffer.numel() * 4 for r in self._residuals.values())

    def state_dict(self) -> dict[str, Any]:
        """Everything that affects the next step, for this rank's checkpoint file. Local."""
        return {
            str(bucket): {"buffer": residual.buffer, "is_zero": residual.is_zero}
            for bucket, residual in self._residuals.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the residuals of `state_dict`. Local."""
        self._residuals = {}
        for bucket, saved in state.items():
            buffer = saved["buffer"]
            residual = Residual(0, buffer.device)
            residual.buffer = buffer.detach().clone()
            residual.is_zero = bool(saved["is_zero"])
            self._residuals[int(bucket)] = residual
