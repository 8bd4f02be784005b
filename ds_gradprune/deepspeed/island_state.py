"""What an island's checkpoint holds beside DeepSpeed's files, and how it is put back.

`read` checks everything and changes nothing; what it returns cannot fail. All functions are local.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ds_gradprune.deepspeed.resize import Handed, deliver
from ds_gradprune.errors import CheckpointError
from ds_gradprune.train.islands import Islands
from ds_gradprune.train.piece import Shards


class IslandState:
    """Saves and restores one island.

    Args:
        engine: the DeepSpeed engine.
        islands: the algorithm.
        shards: the fp32 weights of this rank.
    """

    def __init__(self, engine: Any, islands: Islands, shards: Shards) -> None:
        self._engine = engine
        self._islands = islands
        self._shards = shards
        self._decay = 0.0 if islands.kept is None else islands.kept.decay

    def save(self) -> dict[str, Any]:
        """Everything of the island that affects the next step."""
        scheduler = self._engine.lr_scheduler
        return {
            "have_parted": self._islands.have_parted,
            "own": self._islands.weights.own_state(),
            "rule": self._islands.rule.state_dict(),
            "kept": None if self._islands.kept is None else self._islands.kept.state_dict(),
            "optimizer": self._shards.state_dict(),
            "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
            "skipped_steps": self._engine.skipped_steps,
            "buffers": dict(_persistent_buffers(self._engine.module)),
        }

    def read(
        self, island: Mapping[str, Any], *, handed: Handed | None = None, factor: float = 0.0
    ) -> Callable[[], None]:
        """Check a state.

        Args:
            island: what `save` gave.
            handed: it is island 0's of another number of islands: this one begins with the shared
                weights, and those take what the old islands hand over.
            factor: weight of one old island's update in the move of the shared weights.

        Returns:
            What puts it into force, after DeepSpeed has loaded the shared weights.

        Raises:
            CheckpointError: it is of another model or rule.
        """
        buffers = dict(_persistent_buffers(self._engine.module))
        if buffers.keys() != island["buffers"].keys():
            raise CheckpointError(
                f"the checkpoint's buffers must be the model's, got {sorted(island['buffers'])} "
                f"for {sorted(buffers)}. Resume with the model that saved it."
            )
        if not self._islands.weights.fits(island["own"]):
            raise CheckpointError(
                "the checkpoint's weights must be those that the optimizer steps: their number or "
                "their sizes differ. Resume with the model, the ZeRO stage and the parameters in "
                "the optimizer that saved it."
            )
        if (island["lr_scheduler"] is None) != (self._engine.lr_scheduler is None):
            was, now = ("none", "one") if island["lr_scheduler"] is None else ("one", "none")
            raise CheckpointError(
                f"the checkpoint has {was} learning rate schedule, and this run has {now}. Resume "
                "with the schedule that saved it."
            )
        rule = self._islands.rule.read(island["rule"])
        residual = self._islands.kept
        kept = None if residual is None or island["kept"] is None else residual.read(island["kept"])
        return lambda: self._take(island, rule, kept, handed, factor)

    def restart(self, *, has_states: bool) -> None:
        """A checkpoint without our state was loaded: its weights are everybody's.

        Args:
            has_states: the optimizer's state and the schedule are the checkpoint's, too. Else they
                are still each island's own, so gradients must not be averaged any more.
        """
        if has_states:
            self._islands.have_parted = False
        self._islands.weights.capture()
        self._islands.rule.reset()
        if self._islands.kept is not None:
            self._islands.kept.reset()

    @torch.no_grad()
    def _take(
        self,
        island: Mapping[str, Any],
        rule: Any,
        kept: Any,
        handed: Handed | None,
        factor: float,
    ) -> None:
        islands, weights = self._islands, self._islands.weights
        weights.capture()  # what DeepSpeed has loaded are the shared weights
        islands.rule.take(rule)
        if islands.kept is not None:
            islands.kept.take([] if kept is None or handed is not None else kept)
        islands.have_parted = bool(island["have_parted"])
        if island["optimizer"] is not None:  # else DeepSpeed's files have it: see `carried`
            self._shards.load_state_dict(island["optimizer"])
            if self._engine.lr_scheduler is not None:
                self._engine.lr_scheduler.load_state_dict(island["lr_scheduler"])
            self._engine.skipped_steps = island["skipped_steps"]
        if handed is not None:
            deliver(weights, island["own"], handed, factor, self._decay)
        else:
            for name, buffer in _persistent_buffers(self._engine.module):
                buffer.copy_(island["buffers"][name])
            weights.set_own(island["own"])
        self._shards.publish()


def _persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that a state_dict holds."""
    for prefix, inner in module.named_modules():
        for name, buffer in inner._buffers.items():
            if buffer is not None and name not in inner._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer
