"""A piece: the part of one parameter that this rank exchanges for its island.

An island's ranks divide its fp32 weights among them. Every rank exchanges its own part with the
ranks of the same index on the other islands. A piece never crosses a parameter's boundary, and
padding is in no piece. Knows nothing of DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive elements of one parameter.

    Attributes:
        key: stable over the run, and equal on the same-index ranks of all islands.
        name: the parameter's name in the model.
        own: (numel,) fp32, contiguous, a view of what the optimizer steps. Whoever writes into it
            changes the optimizer's weights.
        pruned: its elements are selected; False: always sent whole. The whole parameter's shape
            decides, not the part's.
    """

    key: Hashable
    name: str
    own: torch.Tensor
    pruned: bool


@dataclass(frozen=True)
class Rest:
    """What the model holds beyond the pieces: frozen parameters and buffers.

    Nothing of it is exchanged, so it must be equal on all islands from the start.

    Attributes:
        sharded: this rank's part of what the island's ranks divide among them.
        whole: what every rank of the island holds.
    """

    sharded: list[torch.Tensor]
    whole: list[torch.Tensor]


class Shards(Protocol):
    """The fp32 weights of an island, as far as this rank exchanges them.

    Attributes:
        has_masters: the model's weights are copies of what the optimizer steps. A user's write to
            them is lost at the next step, as in plain DeepSpeed.
        warmup_fault: one sentence, why a dense warm-up is impossible here; None: it is possible.
    """

    has_masters: bool
    warmup_fault: str | None

    def pieces(self) -> list[Piece]:
        """What the optimizer steps now, in an order that is the same on all islands. Local.

        Ask anew whenever DeepSpeed may have moved the weights. A list that is returned again holds
        the same pieces, in the same memory.
        """

    def every_piece(self) -> list[Piece]:
        """The same, parameters included that are frozen now. Local."""

    def rest(self) -> Rest:
        """What is never exchanged. Local."""

    def publish(self) -> None:
        """Bring the fp32 weights into the model. Collective: all ranks of the island."""

    def gradients(self) -> list[torch.Tensor]:
        """What the optimizer is about to step with: means over the island, this rank's part.

        1-D and contiguous, one per piece of `pieces`, in its order. They may be changed in place
        before `gradients_changed` is called. At ZeRO stage 0 nobody asks: there DeepSpeed reduces
        whole gradients. Local.
        """

    def gradients_changed(self) -> None:
        """Take anew what the optimizer has derived from `gradients` already.

        Collective: all ranks of the island.
        """

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state without the weights: tensors, numbers, texts. Local."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, in place; the weights stay. Local.

        Raises:
            CheckpointError: the state is of other tensors; nothing has changed then.
        """

    def close(self) -> None:
        """Give DeepSpeed back what was changed in it. Local."""
