"""AdamW over rows: one optimizer for all workers, or one for each.

Loshchilov and Hutter 2019, as torch.optim.AdamW computes it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from labs.convergence.grid import Train


def learning_rate(train: Train, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from `lr` to `lr_end` of it; `step` counts from 0."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    part = train.lr_end + (1 - train.lr_end) * cosine
    return train.lr * min(1.0, (step + 1) / train.lr_warmup_steps) * part


LearningRates = float | Sequence[float]
"""One for all rows, or one per row."""


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
        is_fused: a step is one kernel of torch's, as on accelerators: the same up to rounding.
    """

    def __init__(self, rows: int, decayed: torch.Tensor, train: Train) -> None:
        self.m = torch.zeros(rows, decayed.numel(), device=decayed.device)
        self.v = torch.zeros_like(self.m)
        self.steps = self.v_steps = 0
        self.is_fused = decayed.is_cuda
        self._train = train
        self._decayed = decayed
        self._decay = decayed * train.weight_decay
        self._parts: list[tuple[float, list[slice]]] = []
        self._kept: dict[tuple[int, ...], list[tuple[float, list[list[torch.Tensor]]]]] = {}

    def copied(self, rows: int) -> AdamW:
        """One of so many rows that goes on where this one, of one row, stands."""
        return self.spread([0] * rows)

    def spread(self, rows: Sequence[int]) -> AdamW:
        """One whose rows go on where these rows of this one stand."""
        other = AdamW(len(rows), self._decayed, self._train)
        other.m.copy_(self.m[list(rows)])
        other.v.copy_(self.v[list(rows)])
        other.steps, other.v_steps = self.steps, self.v_steps
        return other

    def step(self, weights: torch.Tensor, gradient: torch.Tensor, lr: LearningRates) -> None:
        """The usual step, in place on (rows, numel) `weights`."""
        if self.is_fused:
            self._step_fused(weights, gradient, lr)
            return
        beta1, beta2 = self._train.beta1, self._train.beta2
        self.v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        self.v_steps += 1
        self.steps += 1
        self.m.mul_(beta1).add_(gradient, alpha=1 - beta1)
        self.apply(weights, lr)

    def apply(self, weights: torch.Tensor, lr: LearningRates) -> None:
        """Decay the weights, then move them by the bias-corrected m / (sqrt(v) + eps)."""
        first = 1 - self._train.beta1**self.steps
        second = 1 - self._train.beta2**self.v_steps
        for rows, own_lr in _alike(lr, len(weights)):
            weights[rows].mul_(1 - own_lr * self._decay)
            bottom = (self.v[rows] / second).sqrt_().add_(self._train.eps)
            weights[rows].addcdiv_(self.m[rows], bottom, value=-own_lr / first)

    def _step_fused(self, weights: torch.Tensor, gradient: torch.Tensor, lr: LearningRates) -> None:
        train = self._train
        self.v_steps += 1
        self.steps += 1
        count = torch.full((), float(self.steps), device=weights.device)
        for rows, own_lr in _alike(lr, len(weights)):
            for decay, tensors in self._lists(weights, gradient, rows):
                weights_of, slopes, first, second = tensors
                counts = [count] * len(weights_of)
                torch._fused_adamw_(
                    weights_of,
                    slopes,
                    first,
                    second,
                    [],
                    counts,
                    lr=own_lr,
                    beta1=train.beta1,
                    beta2=train.beta2,
                    weight_decay=decay,
                    eps=train.eps,
                    amsgrad=False,
                    maximize=False,
                )

    def _lists(
        self, weights: torch.Tensor, gradient: torch.Tensor, rows: slice
    ) -> list[tuple[float, list[list[torch.Tensor]]]]:
        """Weights, gradients and moments of some rows as the kernel takes them, by decay."""
        matrices = (weights, gradient, self.m, self.v)
        key = (rows.start, rows.stop, *(matrix.data_ptr() for matrix in matrices))
        if key not in self._kept:
            self._kept[key] = [
                (decay, [[row[part] for row in m[rows] for part in parts] for m in matrices])
                for decay, parts in self._spans()
            ]
        return self._kept[key]

    def _spans(self) -> list[tuple[float, list[slice]]]:
        """Where decay applies, and where none does."""
        if not self._parts:
            values, counts = torch.unique_consecutive(self._decayed.cpu(), return_counts=True)
            ends = list(itertools.accumulate(counts.tolist(), initial=0))
            spans = [slice(*pair) for pair in itertools.pairwise(ends)]
            for has, decay in ((1.0, self._train.weight_decay), (0.0, 0.0)):
                mine = [s for s, v in zip(spans, values.tolist(), strict=True) if v == has]
                if mine:
                    self._parts.append((decay, mine))
        return self._parts


def _alike(lr: LearningRates, rows: int) -> Iterator[tuple[slice, float]]:
    """Neighbouring rows of one learning rate."""
    if isinstance(lr, (int, float)):
        yield slice(0, rows), float(lr)
        return
    start = 0
    for own, same in itertools.groupby(lr):
        stop = start + len(list(same))
        yield slice(start, stop), own
        start = stop
