"""A checkpoint of another number of islands: what they had learned and not sent is handed over.

With pruned updates all of it moves the shared weights when the run goes on, as one dense exchange
of the old islands would have moved them: residuals, and what owners still had to send. With pruned
gradients the mean of all residuals becomes everybody's. Either way the sum of what is owed to the
weights stays what it was.

Every rank reads the files of all old islands, one after the other, so all compute the same bits. A
host that does not have them all is told, and only those count that every host has.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_gradprune.deepspeed import statefile
from ds_gradprune.deepspeed.agree import gather_texts, raise_together
from ds_gradprune.errors import CheckpointError
from ds_gradprune.train.shared_weights import Bound, SharedWeights
from ds_gradprune.wire.owned import OwnedResiduals
from ds_gradprune.wire.shares import share_out
from ds_gradprune.wire.transport import Transport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Handed:
    """What the old islands hand over, summed over those whose files every rank has.

    Attributes:
        num_islands: how many there were.
        islands: those that count; island 0 first.
        own: key of a piece -> sum of their own weights less island 0's.
        kept: store after store of the kept residuals' sum; empty: they had none.
        owed: (island, bucket -> what it owes as an owner) of `owner_reduce`.
        residuals: parameter -> sum of the residuals of pruned gradients.
    """

    num_islands: int
    islands: Sequence[int] = (0,)
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: list[torch.Tensor] = field(default_factory=list)
    owed: list[tuple[int, Mapping[int, Any]]] = field(default_factory=list)
    residuals: dict[str, torch.Tensor] = field(default_factory=dict)

    def mean_residuals(self) -> dict[str, torch.Tensor]:
        """What every rank owes from now on: its mean over new ranks is that over the old ones."""
        return {key: total / self.num_islands for key, total in self.residuals.items()}


@torch.no_grad()
def collect(
    transport: Transport,
    paths: Mapping[int, str],
    first: Mapping[str, Any],
    stamp: statefile.Stamp,
) -> Handed:
    """Read what the old islands hand over. Nothing else is changed.

    Args:
        transport: over all ranks.
        paths: island -> file of this rank's shard, as far as this host has them.
        first: the state of island 0.
        stamp: that of its file; the others must be of the same save.

    Raises:
        CheckpointError: a file is damaged or of another save or model; on all ranks alike.

    Collective: all ranks.
    """
    mine = sorted(island for island in paths if island < stamp.num_islands)
    seen = [set(json.loads(text)) for text in gather_texts(transport, json.dumps(mine))]
    islands = [0, *(i for i in range(1, stamp.num_islands) if all(i in one for one in seen))]
    if len(islands) < stamp.num_islands and transport.rank == 0:
        left_out = [i for i in range(stamp.num_islands) if i not in islands]
        logger.warning(
            "what island %s had learned and not sent is left out: its file is not on every host. "
            "Copy the checkpoint to all hosts before you resume with another number of islands.",
            ", ".join(map(str, left_out)),
        )
    handed = Handed(stamp.num_islands, islands)
    fault: CheckpointError | None = None
    try:
        for island in islands:
            state = first if island == 0 else _read(paths[island], stamp)
            _add(handed, state, first)
    except CheckpointError as exc:
        fault = exc
    raise_together(transport, fault)
    return handed


@torch.no_grad()
def deliver(
    weights: SharedWeights,
    own: Mapping[str, torch.Tensor],
    handed: Handed,
    factor: float,
    decay: float,
) -> None:
    """Move shared weights by what was handed over; the own weights become the shared ones. Local.

    Args:
        weights: own and shared weights, both as the checkpoint has the shared ones.
        own: those of island 0.
        handed: of all old islands.
        factor: weight of one old island's update in the move of the shared weights.
        decay: of the kept residual.

    Raises:
        CheckpointError, UnsupportedError: a residual is of other weights; nothing has moved.
    """
    if handed.kept and [t.shape for t in handed.kept] != [t.shape for t in weights.stores]:
        raise CheckpointError(
            "the checkpoint's kept residual is of other weights than this run trains. Resume with "
            "the same layers frozen as when it was saved."
        )
    owed = _owed(weights, handed)
    for piece in weights.known():
        key = repr(piece.key)
        if key in own and key in handed.own:
            shared = weights.shared(piece)
            progress = own[key].to(shared.device).sub(shared).mul_(len(handed.islands))
            shared.add_(progress.add_(handed.own[key].to(shared.device)), alpha=factor)
    for store, kept in zip(weights.stores, handed.kept, strict=False):
        store.add_(kept.to(store.device), alpha=factor * decay)
    for bound, total in owed:
        bound.shared.add_(total.to(bound.shared.device), alpha=factor)
    weights.reset_own()


def _owed(weights: SharedWeights, handed: Handed) -> list[tuple[Bound, torch.Tensor]]:
    """What the owners still had to send of every bucket."""
    found = []
    for number, bound in enumerate(weights.bound() if handed.owed else ()):
        shares = share_out(bound.layout, handed.num_islands)
        total = torch.zeros(bound.layout.numel)
        for island, buckets in handed.owed:
            residuals = OwnedResiduals(keep=True)
            residuals.load_state_dict(buckets)
            residuals.pay(number, shares[island], total, 1.0)
        found.append((bound, total))
    return found


def _read(path: str, stamp: statefile.Stamp) -> Mapping[str, Any]:
    content, found = statefile.read(path)
    if (found.step, found.num_islands) != (stamp.step, stamp.num_islands):
        raise CheckpointError(
            f"{path} must be of the save after step {stamp.step} by {stamp.num_islands} islands, "
            f"got step {found.step} by {found.num_islands}."
        )
    state: Mapping[str, Any] = content["pruning"]
    return state


def _add(handed: Handed, state: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    island, first_island = state.get("island", {}), first.get("island", {})
    base = first_island.get("own", {})
    for key, own in island.get("own", {}).items():
        if key not in base or base[key].shape != own.shape:
            raise CheckpointError(f"the checkpoint's islands have other weights at {key}.")
        _plus(handed.own, key, own - base[key])
    for number, kept in enumerate(island.get("kept") or ()):
        if number < len(handed.kept):
            handed.kept[number].add_(kept)
        else:
            handed.kept.append(kept.clone())
    if "island" in state and (channel := state.get("channel")):
        handed.owed.append((int(channel["rank"]), channel["buckets"]))
    for key, residual in state.get("residuals", {}).items():
        _plus(handed.residuals, key, residual)


def _plus(totals: dict[str, torch.Tensor], key: str, value: torch.Tensor) -> None:
    if key in totals:
        totals[key].add_(value)
    else:
        totals[key] = value.clone()
