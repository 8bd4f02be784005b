"""1-bit Adam and 0/1 Adam: simulated, because DeepSpeed's own do not run on a CPU.

Their last release, DeepSpeed 0.19.6, packs signs with CuPy (backends nccl and mpi), torch_npu
(hccl) or a SYCL kernel (compressed). What is here makes the same update and sends the same bytes.

1-bit Adam: `runtime/fp16/onebit/adam.py`; Tang et al., ICML 2021, arXiv 2102.02888, algorithm 1.
0/1 Adam: `runtime/fp16/onebit/zoadam.py`; Lu et al., ICLR 2023, arXiv 2202.06009, algorithm 1.

Different from there, because it helps them in a short run, and is what all methods here have:

- Adam's bias correction. DeepSpeed leaves it out; a second moment that is frozen early would stay
  too small for good. Each moment is corrected for as many updates as it has had.
- In 0/1 Adam the weight decay stands beside the averaged steps, not in them; there it comes back
  through the momentum, 1 / (1 - beta1) times as strong.
- Parameters go back to the last common ones by a copy, not by subtracting the steps again: so they
  are equal on all ranks after every exchange, to the bit.

Gradients are clipped as there: the average where it is exchanged densely, else each rank's own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from labs.race.job import Policy
from labs.race.onebit import OneBitMean, Wire

Kind = Literal["usual", "dense", "silent"]
"""Of a step: compressed; not compressed, at first or in between; without any exchange."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What every Adam here shares.

    Attributes:
        beta1, beta2, eps, weight_decay: as in torch's AdamW.
        clip_norm: gradients are clipped to this norm.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float


class _Adam:
    """Moments, their corrections, and the dense step.

    Attributes:
        codec_s: seconds spent on compression so far.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], wire: Wire, rules: Rules) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._wire, self._rules = wire, rules
        self._first = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._second = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._mean = OneBitMean(self._first, wire)
        self._steps = self._second_updates = 0
        self.codec_s = 0.0

    def _gradients(self) -> list[torch.Tensor]:
        gradients = [parameter.grad for parameter in self._parameters]
        assert all(gradient is not None for gradient in gradients)
        return [gradient for gradient in gradients if gradient is not None]

    def _average_dense(self) -> None:
        """Gradients become their average over the ranks. Collective."""
        gradients = self._gradients()
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._wire.all_reduce(flat)
        flat /= self._wire.size
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _average(self, tensors: list[torch.Tensor]) -> None:
        """The same of any tensors, in one bit. Collective."""
        start_s, waited_s = time.perf_counter(), self._wire.waited_s
        self._mean(tensors)
        self.codec_s += time.perf_counter() - start_s - (self._wire.waited_s - waited_s)

    def _clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters, self._rules.clip_norm)

    def _update_first(self) -> None:
        for first, gradient in zip(self._first, self._gradients(), strict=True):
            first.mul_(self._rules.beta1).add_(gradient, alpha=1 - self._rules.beta1)

    def _update_second(self) -> None:
        beta2 = self._rules.beta2
        for second, gradient in zip(self._second, self._gradients(), strict=True):
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        self._second_updates += 1

    def _rate(self, lr: float) -> float:
        """Learning rate times the correction of the first moment."""
        return lr / (1 - self._rules.beta1**self._steps)

    def _roots(self) -> list[torch.Tensor]:
        """The denominators of the update."""
        correction = math.sqrt(1 - self._rules.beta2**self._second_updates)
        return [(second.sqrt() / correction).add_(self._rules.eps) for second in self._second]

    def _decay(self, tensors: Iterable[torch.Tensor], lr: float) -> None:
        for tensor in tensors:
            tensor.mul_(1 - lr * self._rules.weight_decay)

    def _move(self, lr: float, roots: list[torch.Tensor]) -> None:
        self._decay(self._parameters, lr)
        for parameter, first, root in zip(self._parameters, self._first, roots, strict=True):
            parameter.addcdiv_(first, root, value=-self._rate(lr))


class OneBitAdam(_Adam):
    """Dense Adam at first; then the second moment is frozen and the first averaged in one bit.

    Args:
        parameters: of the model; those without gradient are left alone.
        wire: between the ranks.
        rules: of Adam.
        freeze_step: the last dense step.
    """

    def __init__(
        self, parameters: Iterable[torch.Tensor], wire: Wire, rules: Rules, freeze_step: int
    ) -> None:
        super().__init__(parameters, wire, rules)
        self._freeze_step = freeze_step
        self._frozen_roots: list[torch.Tensor] = []

    @torch.no_grad()
    def step(self, lr: float) -> Kind:
        """One update from the ranks' gradients. Collective."""
        self._steps += 1
        if self._steps <= self._freeze_step:
            self._average_dense()
            self._clip()
            self._update_first()
            self._update_second()
            self._frozen_roots = self._roots()
            self._move(lr, self._frozen_roots)
            return "dense"
        self._clip()
        self._update_first()
        self._average(self._first)
        self._move(lr, self._frozen_roots)
        return "usual"


class ZeroOneAdam(_Adam):
    """Second moment updated ever more rarely, then frozen; then exchanges ever more rarely as well.

    Until it is frozen, a step that updates it is dense, and the gradients of the steps between are
    averaged in one bit. From then on the ranks step apart, adding up learning rate times first
    moment; the sum is averaged in one bit, and replaces steps and first moment on all ranks.

    Args:
        parameters: of the model; those without gradient are left alone.
        wire: between the ranks.
        rules: of Adam.
        policy: when what is done.
    """

    def __init__(
        self, parameters: Iterable[torch.Tensor], wire: Wire, rules: Rules, policy: Policy
    ) -> None:
        super().__init__(parameters, wire, rules)
        self._policy = policy
        self._update_interval = self._exchange_interval = 1
        self._updates_at_interval = self._steps_at_interval = 0
        self._frozen_roots: list[torch.Tensor] = []
        self._common: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []
        self._rates = 0.0

    @torch.no_grad()
    def step(self, lr: float) -> Kind:
        """One update from the ranks' gradients. Collective."""
        self._steps += 1
        if self._steps <= self._policy.var_freeze_step:
            return self._step_together(lr)
        if not self._frozen_roots:
            self._freeze()
        return self._step_apart(lr)

    def _step_together(self, lr: float) -> Kind:
        kind: Kind = "dense" if self._steps % self._update_interval == 0 else "usual"
        if kind == "dense":
            self._average_dense()
            self._clip()
            self._update_second()
            self._updates_at_interval += 1
            if self._updates_at_interval == self._policy.var_update_scaler:
                self._updates_at_interval = 0
                self._update_interval *= 2
        else:
            self._clip()
            self._average(self._gradients())
        self._update_first()
        self._move(lr, self._roots())
        return kind

    def _freeze(self) -> None:
        self._frozen_roots = self._roots()
        self._common = [parameter.clone() for parameter in self._parameters]
        self._sums = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._mean.forget()  # errors of gradients are none of sums

    def _step_apart(self, lr: float) -> Kind:
        self._clip()
        self._update_first()
        self._move(lr, self._frozen_roots)
        self._decay(self._common, lr)
        for total, first in zip(self._sums, self._first, strict=True):
            total.add_(first, alpha=self._rate(lr))
        self._rates += self._rate(lr)
        kind: Kind = "usual" if self._steps % self._exchange_interval == 0 else "silent"
        if kind == "usual":
            self._meet()
        self._steps_at_interval += 1
        if self._steps_at_interval == self._policy.local_step_scaler:
            self._steps_at_interval = 0
            widest = self._policy.local_step_clipper
            self._exchange_interval = min(widest, 2 * self._exchange_interval)
        return kind

    def _meet(self) -> None:
        self._average(self._sums)
        state = zip(self._parameters, self._common, self._sums, self._first, strict=True)
        for (parameter, common, total, first), root in zip(state, self._frozen_roots, strict=True):
            torch.div(total, self._rates, out=first)
            common.addcdiv_(total, root, value=-1.0)
            parameter.copy_(common)
            total.zero_()
        self._rates = 0.0
