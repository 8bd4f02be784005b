"""What every simulated training method has in common."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from labs.convergence.adamw import AdamW, clip_
from labs.convergence.gpt import Gpt, Gradients
from labs.convergence.grid import Train


@dataclass(frozen=True, slots=True)
class Setting:
    """One training run, but for its method.

    Attributes:
        gpt: the model.
        train: hyper-parameters.
        workers: simulated ranks, one per host.
        steps: optimizer steps.
        seed: of weights and data.
        device: where the workers train.
        exchange_device: where the product exchanges; the same device, or the host.
    """

    gpt: Gpt
    train: Train
    workers: int
    steps: int
    seed: int
    device: str = "cpu"
    exchange_device: str = "cpu"

    def decayed(self) -> torch.Tensor:
        """(numel,) 1.0 for elements of matrices, 0.0 for those of vectors."""
        parts = [torch.full((s.numel(),), float(len(s) > 1)) for s in self.gpt.shapes]
        return torch.cat(parts).to(self.device)


class Simulation(abc.ABC):
    """N workers in one process.

    Attributes:
        shared: (1, numel), the weights that are evaluated.
        received_bits: by one worker, after warm-up, so far.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.shared = setting.gpt.initial(setting.seed)[None].to(setting.device)
        self.received_bits = 0.0

    @abc.abstractmethod
    def step(self, step: int, tokens: torch.Tensor, lr: float) -> float:
        """One optimizer step.

        Args:
            step: counted from 0.
            tokens: (workers, batch, context + 1).
            lr: learning rate of this step.

        Returns:
            Training loss, mean over workers.
        """

    def flushed(self) -> torch.Tensor:
        """(numel,) weights after a last exchange of everything, exactly."""
        return self.shared[0]

    def notes(self) -> dict[str, float]:
        """Figures of the method's own, for the record."""
        return {}

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """End what the simulation has started."""


class SharedGradient(Simulation):
    """Methods in which all workers hold equal weights, at least until warm-up is over."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.adam = AdamW(1, setting.decayed(), setting.train)

    @functools.cached_property
    def _joint(self) -> Gradients:
        """One worker with everyone's sequences."""
        return Gradients(self.setting.gpt, 1, self.setting.device)

    @functools.cached_property
    def apart(self) -> Gradients:
        """All workers, each with its own."""
        return Gradients(self.setting.gpt, self.setting.workers, self.setting.device)

    def dense_step(self, tokens: torch.Tensor, lr: float) -> float:
        """AdamW on the mean gradient: one worker with everyone's sequences."""
        self._joint.weights.copy_(self.shared)
        loss = self._joint(tokens.flatten(0, 1)[None])
        clip_(self._joint.gradient, self.setting.train.clip)
        self.adam.step(self.shared, self._joint.gradient, lr)
        return float(loss)

    def gradients(self, tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Mean loss and (workers, numel) gradients; the matrix is overwritten by the next call."""
        self.apart.weights.copy_(self.shared.expand_as(self.apart.weights))
        losses = self.apart(tokens)
        return float(losses.mean()), self.apart.gradient


class DenseSimulation(SharedGradient):
    """The baseline."""

    def step(self, step: int, tokens: torch.Tensor, lr: float) -> float:
        """See `Simulation.step`; bits are those of a ring all-reduce of fp32."""
        self.count(step)
        return self.dense_step(tokens, lr)

    def count(self, step: int) -> None:
        """Count the bits of a step."""
        if step >= self.setting.train.warmup_steps:
            self.received_bits += ring_bits(32.0 * self.setting.gpt.numel, self.setting.workers)


class Accumulated(Simulation):
    """A method that steps once for the sequences of some steps.

    Args:
        setting: of the run; the method's own warm-up is shorter by the same factor.
        steps: whose sequences make one of the method's.
        inner: makes the method's simulation.
    """

    def __init__(
        self, setting: Setting, steps: int, inner: Callable[[Setting], Simulation]
    ) -> None:
        warmup_steps = max(1, setting.train.warmup_steps // steps)
        train = setting.train.model_copy(update={"warmup_steps": warmup_steps})
        self._inner = inner(replace(setting, train=train, steps=setting.steps // steps))
        self.setting = setting
        self.shared = self._inner.shared
        self.received_bits = 0.0
        self._steps = steps
        self._waiting: list[torch.Tensor] = []
        self._loss = float("nan")

    def step(self, step: int, tokens: torch.Tensor, lr: float) -> float:
        """See `Simulation.step`; the loss is that of the last step of the method."""
        self._waiting.append(tokens)
        if len(self._waiting) == self._steps:
            self._loss = self._inner.step(step // self._steps, torch.cat(self._waiting, 1), lr)
            self.received_bits = self._inner.received_bits
            self._waiting.clear()
        return self._loss

    def flushed(self) -> torch.Tensor:
        """See `Simulation.flushed`."""
        return self._inner.flushed()

    def notes(self) -> dict[str, float]:
        """See `Simulation.notes`."""
        return self._inner.notes()

    def close(self) -> None:
        """See `Simulation.close`."""
        self._inner.close()


def ring_bits(bits: float, workers: int) -> float:
    """Received by one worker when `bits` are all-reduced over a ring."""
    return 2.0 * (workers - 1) / workers * bits
