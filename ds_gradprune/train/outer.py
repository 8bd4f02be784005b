"""How far the shared weights move when the islands' updates are averaged: outer rules.

Adam's update has about the same length on every island, whatever the gradient's. Where the
islands' updates agree, their mean is as long as each of them; where they are noise, it is shorter
by the square root of their number. Dense training does not lose that: averaging gradients shrinks
Adam's second moment along with the noise. So the mean of the updates is multiplied by a factor
between 1 and the number of islands. Where the residual is kept aside it has a second task: what
most islands have not sent yet is missing in the mean.

All functions are local. Nothing is sent for a rule: every island computes it from the deliveries of
all islands, so its state is bit-identical everywhere.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol

import torch

from ds_gradprune.bucket.apply import scatter_add
from ds_gradprune.bucket.block import SparseBlock
from ds_gradprune.errors import CheckpointError
from ds_gradprune.law.arithmetic import power

SLOW_STEPS = 100
"""Optimizer steps that the slow momentum averages over."""


class OuterRule(Protocol):
    """What moves the shared weights beside the deliveries themselves."""

    def begin(self, index: int, store: torch.Tensor, start: int, stop: int) -> None:
        """An exchange of a bucket is applied.

        Args:
            index: number of the store of shared weights that the bucket lies in.
            store: (numel,) fp32, that store.
            start: the bucket's first element in it.
            stop: one past its last.
        """

    def note(self, block: SparseBlock, factor: float) -> None:
        """The shared weights take `factor` times this delivery."""

    def note_dense(self, move: torch.Tensor) -> None:
        """The shared weights move by this (numel,) fp32 vector."""

    def drift(self) -> torch.Tensor | None:
        """(numel,) fp32, what all weights of the bucket move by besides; None: nothing."""

    def reset(self) -> None:
        """Forget the past: the weights have become others."""

    def state_dict(self) -> Any:
        """Everything that affects the next exchange."""

    def read(self, state: Any) -> Any:
        """Check what `state_dict` gave; raises CheckpointError; changes nothing."""

    def take(self, state: Any) -> None:
        """Continue from what `read` returned."""

    @property
    def nbytes(self) -> int:
        """Memory held."""


class Scale:
    """Nothing besides: the deliveries times a factor are the whole move."""

    nbytes = 0

    def begin(self, index: int, store: torch.Tensor, start: int, stop: int) -> None:
        """See `OuterRule`."""

    def note(self, block: SparseBlock, factor: float) -> None:
        """See `OuterRule`."""

    def note_dense(self, move: torch.Tensor) -> None:
        """See `OuterRule`."""

    def drift(self) -> torch.Tensor | None:
        """See `OuterRule`."""
        return None

    def reset(self) -> None:
        """See `OuterRule`."""

    def state_dict(self) -> Any:
        """See `OuterRule`."""
        return None

    def read(self, state: Any) -> Any:
        """See `OuterRule`."""
        if state is not None:
            raise CheckpointError(_other_rule("off", "on"))
        return None

    def take(self, state: Any) -> None:
        """See `OuterRule`."""


class SlowMomentum:
    """Outer momentum: weights that keep moving in one direction are moved further.

    With `move` what an exchange adds to the shared weights, per element::

        drift = decay * drift + strength * (1 - decay) * move
        weights += drift

    A lasting move becomes 1 + strength times as far, noise hardly further. The form is AdEMAMix's
    (Pagliardini et al. 2024, arXiv 2409.03137: a slow average beside the fast one), applied outside
    the optimizer as in SlowMo (Wang et al. 2020, arXiv 1910.00643). It is off by default: it closed
    the gap to dense at 1M parameters, changed little at 0.16M and 10M, and doubled the gap at 10M
    at twice the learning rate (LOG.md, 2026-11-26).

    Args:
        strength: how much of the average is added per exchange, > 0.
        decay: of the average per exchange, in [0, 1).
    """

    def __init__(self, strength: float, decay: float) -> None:
        self._drifts: list[torch.Tensor] = []
        self._kept: torch.Tensor | None = None
        self._current: torch.Tensor | None = None
        self._decay = decay
        self._share = strength * (1.0 - decay)

    @property
    def nbytes(self) -> int:
        """Bytes of the averages: 4 per parameter."""
        return sum(4 * drift.numel() for drift in self._drifts)

    @torch.no_grad()
    def begin(self, index: int, store: torch.Tensor, start: int, stop: int) -> None:
        """See `OuterRule`."""
        while len(self._drifts) <= index:
            self._drifts.append(torch.zeros(0))
        if self._drifts[index].shape != store.shape:
            self._drifts[index] = torch.zeros_like(store)
        elif self._drifts[index].device != store.device:  # as a checkpoint was read
            self._drifts[index] = self._drifts[index].to(store.device)
        self._kept = self._current = self._drifts[index][start:stop].mul_(self._decay)

    @torch.no_grad()
    def note(self, block: SparseBlock, factor: float) -> None:
        """See `OuterRule`."""
        scatter_add(self._beside(block.device), block, factor * self._share)

    @torch.no_grad()
    def note_dense(self, move: torch.Tensor) -> None:
        """See `OuterRule`."""
        self._beside(move.device).add_(move.mul(self._share))

    @torch.no_grad()
    def drift(self) -> torch.Tensor | None:
        """See `OuterRule`."""
        if self._kept is not None and self._current is not None and self._current is not self._kept:
            self._kept.copy_(self._current)
        return self._current

    def _beside(self, device: torch.device) -> torch.Tensor:
        """The bucket's average on the device of what moves it: itself, or a copy."""
        assert self._current is not None
        self._current = self._current.to(device)
        return self._current

    def reset(self) -> None:
        """See `OuterRule`."""
        for drift in self._drifts:
            drift.zero_()

    def state_dict(self) -> Any:
        """See `OuterRule`: the averages, store after store."""
        return self._drifts

    def read(self, state: Any) -> Any:
        """See `OuterRule`."""
        if not isinstance(state, list):
            raise CheckpointError(_other_rule("on", "off"))
        if not all(isinstance(drift, torch.Tensor) for drift in state):
            raise CheckpointError("the pruning state's slow momentum must be a list of tensors.")
        return state

    def take(self, state: Any) -> None:
        """See `OuterRule`."""
        self._drifts = [drift.detach().clone() for drift in state]


TIME_GRID = 2.0**16
"""A round's learning-rate time is a whole number of these parts of a step."""


class TimedMomentum(SlowMomentum):
    """The slow momentum of rounds that differ.

    With `time` what a round lasts, and `decay` that of a step at the highest learning rate::

        drift = decay^time * (time / time before) * drift + strength * (1 - decay^time) * move

    A lasting move becomes 1 + strength times as far, as with `SlowMomentum`, whose numbers these
    are if the time is always the same.

    Args:
        strength: how much of the average is added per exchange, > 0.
    """

    def __init__(self, strength: float) -> None:
        super().__init__(strength, 0.0)
        self._strength = strength
        self._time = 1.0

    def elapse(self, time: float) -> None:
        """The exchange that is next ends a round that has lasted so long.

        Args:
            time: steps at the highest learning rate; a round at rate 0 counts as next to none.
        """
        time = max(time, 1.0 / TIME_GRID)
        left = power(1.0 - 1.0 / SLOW_STEPS, time)
        self._decay = left * (time / self._time)
        self._share = self._strength * (1.0 - left)
        self._time = time

    def state_dict(self) -> Any:
        """See `OuterRule`."""
        return {"time": self._time, "drifts": super().state_dict()}

    def read(self, state: Any) -> Any:
        """See `OuterRule`. What a run with a fixed interval saved is taken, too."""
        if not isinstance(state, dict):
            return {"time": self._time, "drifts": super().read(state)}
        if not isinstance(state.get("time"), float) or not state["time"] > 0.0:
            raise CheckpointError(
                "the pruning state's slow momentum must have a time above 0, got "
                f"{state.get('time')!r}. Resume from another checkpoint."
            )
        return {"time": state["time"], "drifts": super().read(state.get("drifts"))}

    def take(self, state: Any) -> None:
        """See `OuterRule`."""
        self._time = state["time"]
        super().take(state["drifts"])


def make_rule(slow_momentum: float, sync_every: int | Literal["auto"]) -> OuterRule:
    """The rule that a configuration asks for.

    Args:
        slow_momentum: strength of the slow momentum; 0: none.
        sync_every: optimizer steps from one exchange to the next.
    """
    if not slow_momentum:
        return Scale()
    if sync_every == "auto":
        return TimedMomentum(slow_momentum)
    return SlowMomentum(slow_momentum, slow_decay(sync_every))


def update_scale(islands: int, setting: float | None) -> float:
    """The factor on the mean of the islands' updates.

    Args:
        islands: how many there are, >= 1.
        setting: the user's factor; None: the square root of `islands`, right where the updates are
            mostly noise, which holds for small local batches.

    Returns:
        The factor, > 0.
    """
    return math.sqrt(islands) if setting is None else setting


def slow_decay(sync_every: int) -> float:
    """Decay of the slow momentum from one exchange to the next: memory of SLOW_STEPS steps."""
    return (1.0 - 1.0 / SLOW_STEPS) ** sync_every


def _other_rule(must: str, got: str) -> str:
    return (
        f"the pruning state's slow momentum must be {must}, got {got}. Resume with the "
        "slow_momentum that saved it (0 is off)."
    )
