"""AdamW over rows: one optimizer for all workers, or one for each.

Loshchilov and Hutter 2019, as torch.optim.AdamW computes it.
"""

from __future__ import annotations

import math

import torch

from labs.convergence.grid import Train


def learning_rate(train: Train, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from `lr` to `lr_end` of it; `step` counts from 0."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    part = train.lr_end + (1 - train.lr_end) * cosine
    return train.lr * min(1.0, (step + 1) / train.lr_warmup_steps) * part


def clip_(gradient: torch.Tensor, limit: float) -> None:
    """Shrink every row of (rows, numel) to a 2-norm of at most `limit`, in place."""
    norms = gradient.norm(dim=1, keepdim=True)
    gradient.mul_((limit / (norms + 1e-6)).clamp(max=1.0))


class AdamW:
    """Moments of (rows, numel) weights.

    Args:
        rows: independent optimizers.
        decayed: (numel,) 1.0 where weight decay applies, else 0.0.
        train: hyper-parameters.

    Attributes:
        m: first moment, (rows, numel).
        v: second moment, (rows, numel).
        steps: steps of the first moment, for its bias correction.
        v_steps: the same for the second.
    """

    def __init__(self, rows: int, decayed: torch.Tensor, train: Train) -> None:
        self.m = torch.zeros(rows, decayed.numel())
        self.v = torch.zeros(rows, decayed.numel())
        self.steps = self.v_steps = 0
        self._train = train
        self._decayed = decayed
        self._decay = decayed * train.weight_decay

    def copied(self, rows: int) -> AdamW:
        """One of so many rows that goes on where this one, of one row, stands."""
        other = AdamW(rows, self._decayed, self._train)
        other.m.copy_(self.m.expand_as(other.m))
        other.v.copy_(self.v.expand_as(other.v))
        other.steps, other.v_steps = self.steps, self.v_steps
        return other

    def step(self, weights: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        """The usual step, in place on (rows, numel) `weights`."""
        beta1, beta2 = self._train.beta1, self._train.beta2
        self.v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        self.v_steps += 1
        self.steps += 1
        self.m.mul_(beta1).add_(gradient, alpha=1 - beta1)
        self.apply(weights, lr)

    def apply(self, weights: torch.Tensor, lr: float) -> None:
        """Decay the weights, then move them by the bias-corrected m / (sqrt(v) + eps)."""
        first = 1 - self._train.beta1**self.steps
        second = 1 - self._train.beta2**self.v_steps
        weights.mul_(1 - lr * self._decay)
        bottom = (self.v / second).sqrt_().add_(self._train.eps)
        weights.addcdiv_(self.m, bottom, value=-lr / first)
