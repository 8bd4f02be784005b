"""ZeRO stage 0: every rank of an island holds all its fp32 weights (deepspeed 0.19.8).

- fp32: the optimizer is the user's own, and its parameters are the model's.
- bf16 or fp16, FusedAdam: `FP16_Optimizer` has one flat fp32 tensor for every parameter group.
- bf16 or fp16, anything else: `FP16_UnfusedOptimizer` has one fp32 tensor for every parameter.

The ranks of an island divide the weights among them for the exchange. Each owns a contiguous part,
and hands it to the others in `publish`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from ds_gradprune.deepspeed.groups import Groups
from ds_gradprune.deepspeed.moments import load_scaler, load_state, scaler_of, state_of
from ds_gradprune.deepspeed.spans import Names, Span, balanced, pieces_of, require_fp32, rest_of
from ds_gradprune.errors import UnsupportedError
from ds_gradprune.train.piece import Piece, Rest

_LOT_NUMEL = 2**22
"""Elements that travel together inside an island: 16 MB of fp32."""

_Window = tuple[int, int, int]
"""Index of a flat tensor, first element, one past the last."""


class Zero0:
    """The fp32 weights of an engine at stage 0; see `train.piece.Shards`.

    Args:
        engine: a DeepSpeed engine.
        groups: the island.
        names: the engine's parameters.

    Raises:
        UnsupportedError: weights are not fp32, or do not lie contiguously.
    """

    warmup_fault: str | None = None

    def __init__(self, engine: Any, groups: Groups, names: Names) -> None:
        self._engine = engine
        self._groups = groups
        self._optimizer = engine.optimizer
        self.has_masters = isinstance(self._optimizer, (FP16_Optimizer, FP16_UnfusedOptimizer))
        self._base = self._optimizer.optimizer if self.has_masters else self._optimizer
        self._spans = list(self._lay_out(names))
        for name, tensor in zip(self._tensor_names(), self._tensors(), strict=True):
            _require_contiguous(name, tensor)
        require_fp32(self._tensor_names(), self._tensors())
        self._seen_at: tuple[int, ...] = ()
        self._seen: dict[tuple[bool, ...], list[Piece]] = {}
        self._trained: set[int] = set()
        self._note_trained()
        self._shares = self._divide()
        self._own = [
            part
            for flat, start, stop in self._shares[groups.shard]
            for span in self._spans
            if span.flat == flat and (part := span.within(start, stop)) is not None
        ]

    def pieces(self) -> list[Piece]:
        """See `Shards.pieces`.

        Masters of a frozen parameter are stepped on, with weight decay and momentum, so their
        pieces stay.
        """
        self._note_trained()
        return self._views(tuple(self.has_masters or s.parameter.requires_grad for s in self._own))

    def every_piece(self) -> list[Piece]:
        """See `Shards.every_piece`."""
        return self._views((True,) * len(self._own))

    def _views(self, wanted: tuple[bool, ...]) -> list[Piece]:
        """Of the own spans that are wanted; those of before, if no weight has moved since."""
        places = tuple(tensor.data_ptr() for tensor in self._tensors())
        if places != self._seen_at:
            self._seen_at, self._seen = places, {}
        if wanted not in self._seen:
            spans = [span for span, is_wanted in zip(self._own, wanted, strict=True) if is_wanted]
            self._seen[wanted] = pieces_of(spans, self._flats())
        return self._seen[wanted]

    def rest(self) -> Rest:
        """See `Shards.rest`."""
        return rest_of(self._engine.module, [span.parameter for span in self._spans])

    @torch.no_grad()
    def publish(self) -> None:
        """See `Shards.publish`. Every owner hands its part to the island, bit for bit."""
        self._note_trained()
        flats = self._flats()
        if self._groups.inner is not None:
            for shard, windows in enumerate(self._shares):
                views = [flats[i][low:high] for i, low, high in windows if i in self._trained]
                self._hand_out(views, shard)
        if self.has_masters:
            for span in self._spans:
                span.parameter.data.copy_(span.view(flats).view(span.parameter.shape))

    def gradients(self) -> list[torch.Tensor]:
        """See `Shards.gradients`: nobody asks."""
        raise NotImplementedError("at stage 0 DeepSpeed reduces whole gradients")

    def gradients_changed(self) -> None:
        """See `Shards.gradients_changed`: nobody calls it."""

    def state_dict(self) -> dict[str, Any]:
        """See `Shards.state_dict`."""
        return state_of(self._base, self._tensors()) | {"scaler": scaler_of(self._optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Shards.load_state_dict`."""
        load_state(self._base, self._tensors(), state)
        load_scaler(self._optimizer, state["scaler"])

    def close(self) -> None:
        """Nothing was changed."""

    # ---- where the weights lie -----------------------------------------------------------------

    def _parameters(self) -> list[list[torch.nn.Parameter]]:
        """The model's parameters, group by group, in the optimizer's order."""
        if self.has_masters:
            groups: list[list[torch.nn.Parameter]] = self._optimizer.fp16_groups
            return groups
        return [group["params"] for group in self._optimizer.param_groups]

    def _tensors(self) -> list[torch.Tensor]:
        """What the optimizer steps: one per group with FusedAdam, else one per parameter."""
        if isinstance(self._optimizer, FP16_Optimizer):
            return list(self._optimizer.fp32_groups_flat)
        groups = self._optimizer.fp32_groups if self.has_masters else self._parameters()
        return [tensor for group in groups for tensor in group]

    def _flats(self) -> list[torch.Tensor]:
        """What the optimizer steps, 1-D.

        Autograd does not see writes through `data`. So an evaluation between a forward and its
        backward, for which the shared weights come and go, is no change of what was saved.
        """
        return [tensor.data.view(-1) for tensor in self._tensors()]

    def _tensor_names(self) -> list[str]:
        of_flat: dict[int, list[str]] = {}
        for span in self._spans:
            of_flat.setdefault(span.flat, []).append(span.name)
        empty = ["an empty parameter"]
        return [", ".join(of_flat.get(i, empty)) for i in range(len(self._tensors()))]

    def _lay_out(self, names: Names) -> Iterator[Span]:
        flat = 0
        for group in self._parameters():
            start = 0
            for parameter in group:
                if parameter.numel():
                    yield names.span(parameter, flat, start, parameter.numel())
                if isinstance(self._optimizer, FP16_Optimizer):
                    start += parameter.numel()
                else:
                    flat += 1
            if isinstance(self._optimizer, FP16_Optimizer):
                flat += 1

    # ---- who owns what -------------------------------------------------------------------------

    def _note_trained(self) -> None:
        """Remember what may ever have changed: the rest is not handed out."""
        self._trained |= {
            s.flat for s in self._spans if self.has_masters or s.parameter.requires_grad
        }

    def _divide(self) -> list[list[_Window]]:
        """Windows of every rank: of what is trained, and of what is frozen, equally much."""
        flats = self._flats()
        shares: list[list[_Window]] = [[] for _ in range(self._groups.num_shards)]
        trained = [i for i in range(len(flats)) if i in self._trained]
        frozen = [i for i in range(len(flats)) if i not in self._trained]
        for part in (trained, frozen):
            numels = [flats[i].numel() for i in part]
            for share, windows in zip(shares, balanced(numels, len(shares)), strict=True):
                share += [(part[i], start, stop) for i, start, stop in windows]
        return shares

    def _hand_out(self, views: list[torch.Tensor], shard: int) -> None:
        """Broadcast one rank's part inside the island, small tensors together."""
        owner = self._groups.island * self._groups.num_shards + shard
        for lot in _lots(views):
            if len(lot) == 1:
                dist.broadcast(lot[0], src=owner, group=self._groups.inner)
                continue
            packed = torch.cat(lot)
            dist.broadcast(packed, src=owner, group=self._groups.inner)
            parts = torch.split(packed, [view.numel() for view in lot])
            torch._foreach_copy_(lot, list(parts))


def _lots(views: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors that follow each other, at most `_LOT_NUMEL` elements together unless it is one."""
    lot: list[torch.Tensor] = []
    for view in views:
        if lot and sum(v.numel() for v in lot) + view.numel() > _LOT_NUMEL:
            yield lot
            lot = []
        lot.append(view)
    if lot:
        yield lot


def _require_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise UnsupportedError(
            f'prune = "update" needs weights that lie contiguously in memory, but {name} has '
            f"strides {tensor.stride()} for the shape {tuple(tensor.shape)}. Replace its data by "
            ".contiguous() before deepspeed.initialize."
        )
