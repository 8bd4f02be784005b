"""Which weights the model of an island holds, and what happens to those that others write.

A forward in evaluation mode without gradients, and `state_dict`, see the shared weights; every
other forward the island's own. They stay until something else is asked for.

Where the model's parameters are what the optimizer steps (`has_masters` is false), others can write
them: `load_state_dict`, an assignment, a clamp. What all ranks write alike holds in own and shared
weights. Whether it was alike is compared in the next exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ds_gradprune.deepspeed.consensus import InsideIsland, Occasion
from ds_gradprune.errors import RankMismatchError, UnsupportedError
from ds_gradprune.train.islands import Islands
from ds_gradprune.train.piece import Piece, Shards
from ds_gradprune.train.watch import Watch
from ds_gradprune.wire.channel import Announcement

_HOW = (
    "Weights that training code sets must be set alike on all ranks. For a change that depends on "
    "the weights themselves, such as a clamp, use `for _ in engine.gradprune.weight_sets():` "
    'around it, or "prune": "gradient".'
)


class IslandWeights:
    """Own or shared weights in one engine's model.

    Args:
        engine: the DeepSpeed engine.
        islands: the algorithm.
        shards: the fp32 weights of this rank.
        inside: how the ranks of the island agree.
        land: applies the exchange under way, if there is one.

    Attributes:
        written: names of parameters that somebody else has written since the last exchange.
    """

    def __init__(
        self,
        engine: Any,
        islands: Islands,
        shards: Shards,
        inside: InsideIsland,
        land: Callable[[], None],
    ) -> None:
        self.written: list[str] = []
        self._engine = engine
        self._islands = islands
        self._shards = shards
        self._inside = inside
        self._land = land
        self._watch = None if shards.has_masters else Watch()
        self._held = 0
        ours = engine.module

        # Plain functions that look at their module: a deep copy of the model takes them along.
        def before_forward(module: torch.nn.Module, _inputs: Any) -> None:
            if module is ours:
                self._choose()

        def before_state_dict(module: torch.nn.Module, *_: Any) -> None:
            if module is ours:
                self._hold(shared=True)

        self._handles = [
            # First of all, because ZeRO stage 3 gathers parameters in hooks of its own.
            ours.register_forward_pre_hook(before_forward, prepend=True),
            ours.register_state_dict_pre_hook(before_state_dict),
        ]
        self.note()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """The model holds the shared weights. Collective: all ranks of the island."""
        self._hold(shared=True)
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if not self._held:
                self._hold(shared=False)

    def each(self) -> Iterator[None]:
        """A turn for the own weights, then one for the shared ones. Collective: the island."""
        self.hold_own()
        self.notice_writes()
        yield
        if not self._are_equal:
            # What was changed inside is meant: it is no progress and no foreign write.
            self.note()
            self._hold(shared=True)
            yield
            self.note()
            self._hold(shared=False)
        self.note()

    def hold_own(self) -> None:
        """Training goes on: put the own weights into the model. Collective: the island.

        Raises:
            UnsupportedError: a `shared` block is open.
        """
        if self._held:
            raise UnsupportedError(
                "engine.gradprune.shared_weights() must be left before training goes on: training "
                "needs the island's own weights. Move backward and step out of the with block."
            )
        self._hold(shared=False)

    def give_up_own(self) -> None:
        """The shared weights become the own ones, too. Collective: the island."""
        if not self._are_equal:
            self._islands.weights.reset_own()
            self._shards.publish()
            self.note()

    def land(self) -> None:
        """Apply the exchange under way; it is no write of somebody else. Collective: the island."""
        self.notice_writes()
        self._land()
        self.note()

    def leave_shared(self) -> None:
        """End: the model keeps the shared weights, residuals are given up. Collective: island."""
        self._hold(shared=True)
        for handle in self._handles:
            handle.remove()

    def note(self) -> None:
        """What the model holds now is our own doing. Local."""
        if self._watch is not None and not self._are_equal:
            self._watch.note(self._islands.weights.known())

    @torch.no_grad()
    def notice_writes(self) -> None:
        """What somebody has written into the own weights holds in the shared ones too. Local."""
        self._adopt()

    def check_written(self, announcement: Announcement) -> None:
        """All islands have written the same. Collective: all islands.

        Args:
            announcement: its headers carry a hash of the shared weights as their history.

        Raises:
            RankMismatchError: they have not.
        """
        names, self.written = self.written, []
        try:
            announcement.headers()
        except RankMismatchError as exc:
            listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            where = f"here: {listed}" if names else "on another rank"
            raise RankMismatchError(
                f"weights were written outside of the optimizer, and not alike on all ranks "
                f"({where}). {_HOW}"
            ) from exc

    @property
    def _are_equal(self) -> bool:
        """The own weights are the shared ones: nothing has been stepped alone yet."""
        return not self._islands.have_parted

    def _choose(self) -> None:
        evaluates = not self._engine.module.training and not torch.is_grad_enabled()
        if evaluates or not self._held:
            self._hold(shared=evaluates)

    @torch.no_grad()
    def _hold(self, *, shared: bool) -> None:
        """Put the shared weights, or the island's own, into the model."""
        weights = self._islands.weights
        if self._are_equal or shared == weights.are_swapped:
            return
        self._inside.meet(Occasion.SHARED if shared else Occasion.OWN)
        self._adopt()
        if shared:
            self._land()
        weights.swap()
        self._shards.publish()
        self.note()

    @torch.no_grad()
    def _adopt(self) -> None:
        """Whichever set is in the model: the other one takes what was written into it."""
        foreign = [(piece, piece.own.clone()) for piece in self._foreign()]
        if not foreign:
            return
        self._land()  # what is under way was learned before
        for piece, written in foreign:
            piece.own.copy_(written)
            self._islands.weights.shared(piece).copy_(written)

    def _foreign(self) -> list[Piece]:
        """Pieces that somebody else has written since `note`."""
        if self._watch is None or self._are_equal:
            return []
        foreign = self._watch.written(self._islands.weights.known())
        self.written += [p.name for p in foreign if p.name not in self.written]
        return foreign
