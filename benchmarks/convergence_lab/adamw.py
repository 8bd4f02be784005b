"""AdamW over rows: one optimizer for all workers, or one for each.

Loshchilov and Hutter 2019, as torch.optim.AdamW computes it.
"""

from __future__ import annotations

import math

import torch

from benchmarks.convergence_lab.grid import Train


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
        beta1: instead of `train.beta1`.

    Attributes:
        m: first moment, (rows, numel).
        v: second moment, (rows, numel).
        steps: steps of the first moment, for its bias correction.
        v_steps: the same for the second.
    """

    def __init__(
        self, rows: int, decayed: torch.Tensor, train: Train, beta1: float | None = None
    ) -> None:
        self.m = torch.zeros(rows, decayed.numel())
        self.v = torch.zeros(rows, decayed.numel())
        self.steps = self.v_steps = 0
        self.beta1 = train.beta1 if beta1 is None else beta1
        self.beta2 = train.beta2
        self._decay = decayed * train.weight_decay
        self._eps = train.eps

    def step(self, weights: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        """The usual step, in place on (rows, numel) `weights`."""
        self.note_square(gradient)
        self.move(weights, gradient, lr)

    def note_square(self, gradient: torch.Tensor) -> None:
        """Bring the second moment up to date with a gradient, broadcast over rows."""
        self.v.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        self.v_steps += 1

    def move(self, weights: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        """A step whose second moment has been brought up to date, or is left alone."""
        self.steps += 1
        self.m.mul_(self.beta1).add_(gradient, alpha=1 - self.beta1)
        self.apply(weights, lr)

    def drop_momentum(self) -> None:
        """From now on a step follows its own gradient alone, and does not decay weights."""
        self.beta1 = 0.0
        self._decay = torch.zeros_like(self._decay)

    def apply(self, weights: torch.Tensor, lr: float) -> None:
        """Decay the weights, then move them by the bias-corrected m / (sqrt(v) + eps)."""
        first = 1 - self.beta1**self.steps
        second = 1 - self.beta2**self.v_steps
        weights.mul_(1 - lr * self._decay)
        bottom = self.second_moment(second).sqrt_().add_(self._eps)
        weights.addcdiv_(self.m, bottom, value=-lr / first)

    def second_moment(self, second: float) -> torch.Tensor:
        """What the step divides by the root of; `second` is the correction of its bias. A copy."""
        return self.v / second


class CorrectedAdamW(AdamW):
    """Every row divides by the second moment that the rows' mean gradient has, as it guesses.

    Of a row's second moment, v = signal^2 + noise, the mean has signal^2 + noise / rows. A first
    moment with decay b has the square signal^2 + c noise, c = (1 - b) / (1 + b), so
    signal^2 = (m^2 - c v) / (1 - c), averaged over SIGNAL_STEPS steps.
    """

    SIGNAL_STEPS = 50

    def __init__(self, rows: int, decayed: torch.Tensor, train: Train) -> None:
        super().__init__(rows, decayed, train)
        self._own_m = torch.zeros(rows, decayed.numel())
        self._own_v = torch.zeros(rows, decayed.numel())
        self._signal = torch.zeros(rows, decayed.numel())
        self._noted = 0
        self.guessing = True

    def note(self, gradient: torch.Tensor) -> None:
        """A step's own gradients, (rows, numel), before anything has been averaged."""
        self._noted += 1
        self._own_m.mul_(self.beta1).add_(gradient, alpha=1 - self.beta1)
        self._own_v.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        first = 1 - self.beta1**self._noted
        second = 1 - self.beta2**self._noted
        part = (1 - self.beta1) / (1 + self.beta1)
        square = (self._own_m / first).square_().sub_(self._own_v, alpha=part / second)
        share = 1 / min(self._noted, self.SIGNAL_STEPS)
        self._signal.mul_(1 - share).add_(square, alpha=share / (1 - part))

    def second_moment(self, second: float) -> torch.Tensor:
        """See the class; as AdamW's while not `guessing`."""
        if not self.guessing:
            return super().second_moment(second)
        own = self._own_v / (1 - self.beta2**self._noted)
        signal = torch.minimum(self._signal.clamp(min=0.0), own)
        return own.sub_(signal).div_(len(own)).add_(signal)
