"""Islands: every worker steps its own AdamW, and what it has not sent stays in its weights.

With S the shared weights, x_i and e_i the weights and the unsent progress of worker i::

    e_i += c * (AdamW's move of x_i)      c: scale, if at "local"
    S   += outer(mean_i sent_i)           sent_i: the part of e_i that was sent
    x_i  = S + e_i - sent_i
"""

from __future__ import annotations

import torch

from benchmarks.convergence_lab.adamw import AdamW, CorrectedAdamW, clip_
from benchmarks.convergence_lab.base import Setting, Simulation
from benchmarks.convergence_lab.drift import Drift
from benchmarks.convergence_lab.gpt import Gradients
from benchmarks.convergence_lab.grid import Update
from benchmarks.convergence_lab.wire import Swap, Wire, lab_layout

_SPREAD_DECAY = 0.95
"""Of the average of the measured spread, per exchange."""
_SCORE_STEPS = 50
"""Between renewals of what magnitudes are multiplied by."""


class UpdateSimulation(Simulation):
    """See `grid.Update` for the candidates."""

    def __init__(self, setting: Setting, method: Update) -> None:
        super().__init__(setting)
        self._method = method
        workers, numel = setting.workers, setting.gpt.numel
        self._wire = Wire(lab_layout(setting.gpt.shapes, method.prune_vectors), method)
        self._gradients = Gradients(setting.gpt, workers)
        self._local = self._gradients.weights
        self._local.copy_(self.shared.expand_as(self._local))
        optimizer = CorrectedAdamW if method.second_moment == "corrected" else AdamW
        self._adam = optimizer(workers, setting.decayed(), setting.train)
        self._owed = torch.zeros(workers, numel)
        self._velocity = torch.zeros(1, numel)
        self._drift = None
        if method.slow:
            predicted = method.slow_by != "fixed"
            self._drift = Drift(numel, method.slow, method.slow_decay, predicted=predicted)
        wanted = method.slow_by == "own" or method.deliver == "whole"
        self._whole = torch.zeros(1, numel) if wanted else None
        self._decay = setting.decayed() * setting.train.weight_decay
        self._relayed = torch.zeros(workers, numel) if method.relay else None
        self._spread = workers**0.5
        self._score: torch.Tensor | None = None

    def step(self, step: int, tokens: torch.Tensor, lr: float) -> float:
        """See `Simulation.step`."""
        method = self._method
        is_warmup = step < self.setting.train.warmup_steps
        loss = float(self._gradients(tokens).mean())
        as_dense = is_warmup and method.warmup == "gradient"
        if step == self.setting.train.warmup_steps and method.momentum_at == "shared":
            self._adam.drop_momentum()
        before = self._local.clone()
        self._step_islands(lr * self._own_part(is_warmup), is_warmup=is_warmup, as_dense=as_dense)
        factor = self._scale() if method.scale_at == "local" and not as_dense else 1.0
        moved = self._local.sub_(before)
        self._owed.add_(moved, alpha=factor)
        if self._whole is not None and not as_dense:
            self._whole += moved.mean(0, keepdim=True).mul_(factor * self._shared_scale())
        if as_dense:
            if method.momentum_at == "shared":
                self._velocity.copy_(self._owed[:1])
            self.shared += self._owed[:1]
            self._owed.zero_()
        elif is_warmup:
            self._move(self._send_all())
        elif (step + 1) % method.sync_every == 0:
            if method.momentum_at == "shared":
                self.shared.mul_(1 - lr * method.sync_every * self._decay)
            self._move(self._send(step))
        self._see()
        return loss

    def _step_islands(self, lr: float, *, is_warmup: bool, as_dense: bool) -> None:
        """Every worker's optimizer steps; in a dense warm-up all of them on the mean gradient."""
        gradient = self._gradients.gradient
        if isinstance(self._adam, CorrectedAdamW):
            own = gradient.clone()
            clip_(own, self.setting.train.clip)
            self._adam.note(own)
            self._adam.guessing = not as_dense
        squared = gradient
        if as_dense or self._method.second_moment == "mean":
            squared = gradient.mean(0, keepdim=True)
        if as_dense:
            gradient.copy_(squared)
        clip_(gradient, self.setting.train.clip)
        if squared is not gradient:
            clip_(squared, self.setting.train.clip)
        if is_warmup or not self._method.frozen:
            self._adam.note_square(squared)
        self._adam.move(self._local, gradient, lr)

    def flushed(self) -> torch.Tensor:
        """See `Simulation.flushed`."""
        if self._method.deliver == "whole":
            return self.shared[0]
        return self.shared[0] + self._shared_scale() * self._owed.mean(0)

    def seen(self) -> torch.Tensor:
        """See `Simulation.seen`."""
        return self._local

    def notes(self) -> dict[str, float]:
        """The measured spread, and how large the unsent progress is."""
        owed = float(self._owed.norm(dim=1).mean() / self.shared.norm())
        figures = {"spread": self._spread, "owed_part": owed}
        if self._drift is not None:
            figures["persistence"] = self._drift.persistence
        return figures

    def _own_part(self, is_warmup: bool) -> float:
        """Factor of the learning rate on the islands."""
        if is_warmup and self._method.local_lr_from == "pruning":
            return 1.0
        part = self._method.local_lr
        return float(self.setting.workers**-0.5) if part == "root" else float(part)

    def _scale(self) -> float:
        if self._method.scale == "sqrt":
            return float(self.setting.workers**0.5)
        if self._method.scale == "sum":
            return float(self.setting.workers)
        return self._spread if self._method.scale == "measured" else float(self._method.scale)

    def _shared_scale(self) -> float:
        """Factor of the mean of what was sent."""
        return self._scale() if self._method.scale_at == "shared" else 1.0

    def _send_all(self) -> Swap:
        """Dense warm-up: everything, exactly."""
        mean = self._owed.mean(0)
        mean_norm = float(mean.norm())
        spread = float(self._owed.square().sum(1).mean().sqrt()) / mean_norm if mean_norm else 1.0
        total = mean * self.setting.workers
        self._owed.zero_()
        return Swap(total, 0.0, spread)

    def _send(self, step: int) -> Swap:
        owed_before = self._owed.clone() if self._relayed is not None else None
        density = self.setting.density(self._method, step)
        swap = self._wire.swap(self._owed, density, self._score_now(step))
        self.received_bits += swap.received_bits
        if self._relayed is not None and owed_before is not None:
            share = 1.0 - 1.0 / self.setting.workers
            sent = owed_before.sub_(self._owed)
            self._relayed.add_(sent, alpha=self._method.relay * share)
        return swap

    def _move(self, swap: Swap) -> None:
        """Move the shared weights by the mean of what was sent, or of all there was."""
        method = self._method
        self._spread = _SPREAD_DECAY * self._spread + (1 - _SPREAD_DECAY) * swap.spread
        move = (swap.total / self.setting.workers)[None]
        move = move * self._shared_scale()
        if method.deliver == "whole" and self._whole is not None:
            move = self._whole.clone()
        if method.momentum_at == "shared":
            beta1 = self.setting.train.beta1
            move = self._velocity.mul_(beta1).add_(move, alpha=1 - beta1)
        elif method.momentum:
            self._velocity.mul_(method.momentum).add_(move)
            ahead = self._velocity
            move = move + method.momentum * ahead if method.nesterov else ahead
        if self._drift is not None:
            further = self._drift.add_to(move, self._whole)
            if method.slow_owed:
                self._owed.sub_(further - move, alpha=1.0 / self._shared_scale())
            move = further
        self.shared.add_(move, alpha=method.outer_lr)
        if self._whole is not None:
            self._whole.zero_()

    def _see(self) -> None:
        """Set every worker's weights to what it is meant to see."""
        if self._method.keep < 1.0:
            self._owed *= self._method.keep
        torch.add(self.shared, self._owed, alpha=self._method.own, out=self._local)
        if self._relayed is not None:
            self._local += self._relayed.mul_(self._method.relay_decay)

    def _score_now(self, step: int) -> torch.Tensor | None:
        """(numel,) factor of the magnitudes when they are compared, renewed every 50 steps."""
        if self._method.score == "magnitude":
            return None
        if self._score is None or step % _SCORE_STEPS == 0:
            by_row = self._method.score == "over_row"
            self._score = self._by_row() if by_row else self._by_second_moment()
        return self._score

    def _by_row(self) -> torch.Tensor:
        """1 / root mean square of the row an element lies in."""
        parts = []
        for view in self.setting.gpt.views(self.shared):
            size = view[0].square().mean(-1, keepdim=True).sqrt().clamp(min=1e-3)
            parts.append((1.0 / size).expand_as(view[0]).reshape(-1))
        return torch.cat(parts)

    def _by_second_moment(self) -> torch.Tensor:
        """Mean second moment to a power; an element that has had no gradient keeps a little."""
        mean = self._adam.v.mean(0)
        floor = 1e-3 * float(mean.mean())
        return mean.clamp_(min=max(floor, 1e-30)).pow_(self._method.score_power / 2)
