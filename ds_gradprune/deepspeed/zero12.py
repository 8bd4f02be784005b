"""ZeRO stages 1 and 2: every rank of an island owns a partition of its fp32 weights.

There is one flat tensor per parameter group, divided into equal partitions, one per rank
(deepspeed 0.19.8, runtime/zero/stage_1_and_2.py and runtime/bf16_optimizer.py). Boundaries of
partitions fall inside parameters. Padding lies behind the last parameter, and with
`parameter_alignment` between them. With `offload_optimizer` the partition lies on the CPU.

Where the gradients are when the optimizer is about to step:

- `averaged_gradients[i]`: a list of tensors that, one after the other, fill the partition;
- offloaded: `single_partition_of_fp32_groups[i].grad`. Their norms were taken during backward;
- `BF16_Optimizer` (stage 1, bf16, `grad_accum_dtype` fp32): every rank has whole gradients, and
  takes the norm of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import has_inf_or_nan
from deepspeed.runtime.zero.utils import get_norm_dtype

from ds_gradprune.deepspeed.groups import Groups
from ds_gradprune.deepspeed.moments import load_scaler, load_state, scaler_of, state_of
from ds_gradprune.deepspeed.spans import Names, Span, pieces_of, require_fp32, rest_of
from ds_gradprune.train.piece import Piece, Rest

MUON_FAULT = (
    "at ZeRO stages 1 and 2 Muon turns gradients into updates before ranks of other islands could "
    'average them. Set gradient_pruning.warmup to "unpruned", offload the optimizer, or use stage 3'
)
"""Why a dense warm-up is impossible there."""


class Zero12:
    """The fp32 weights of an engine at stage 1 or 2; see `train.piece.Shards`.

    Args:
        engine: a DeepSpeed engine.
        groups: the island.
        names: the engine's parameters.

    Raises:
        UnsupportedError: the partition is not fp32.
    """

    has_masters = True

    def __init__(self, engine: Any, groups: Groups, names: Names) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._groups = groups
        self._is_offloaded = bool(getattr(self._optimizer, "cpu_offload", False))
        self.warmup_fault = MUON_FAULT if self._muon_comes_first() else None
        self._whole = list(self._lay_out(names))
        self._spans = []
        for span in self._whole:
            size = self._tensors()[span.flat].numel()
            first = groups.shard * size
            part = span.within(first, first + size, origin=first)
            self._spans += [part] if part is not None else []
        numbers = range(len(self._tensors()))
        require_fp32([f"parameter group {number}" for number in numbers], self._tensors())

    def pieces(self) -> list[Piece]:
        """See `Shards.pieces`.

        A parameter that is frozen later is stepped on, with weight decay and momentum, so it stays.
        """
        return pieces_of(self._spans, [tensor.detach() for tensor in self._tensors()])

    every_piece = pieces

    def rest(self) -> Rest:
        """See `Shards.rest`."""
        return rest_of(self._engine.module, [span.parameter for span in self._whole])

    @torch.no_grad()
    def publish(self) -> None:
        """See `Shards.publish`."""
        self._optimizer.update_lp_params()

    @torch.no_grad()
    def gradients(self) -> list[torch.Tensor]:
        """See `Shards.gradients`."""
        if self._is_offloaded:
            self._optimizer._wait_for_offload_copies()
            grads: list[Any] = [tensor.grad for tensor in self._tensors()]
            return [span.view(grads) for span in self._spans]
        if isinstance(self._optimizer, BF16_Optimizer):
            partitions = self._optimizer.fp32_groups_gradient_flat_partition
            return [span.view(partitions) for span in self._spans]
        parts = [dict(self._parts(flat)) for flat in range(len(self._tensors()))]
        return [parts[span.flat][span.start] for span in self._spans]

    @torch.no_grad()
    def gradients_changed(self) -> None:
        """See `Shards.gradients_changed`."""
        if isinstance(self._optimizer, BF16_Optimizer):
            self._complete_gradients()
        elif self._is_offloaded:
            self._take_norms()

    def state_dict(self) -> dict[str, Any]:
        """See `Shards.state_dict`."""
        base = self._optimizer.optimizer
        return state_of(base, self._tensors()) | {"scaler": scaler_of(self._optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Shards.load_state_dict`."""
        load_state(self._optimizer.optimizer, self._tensors(), state)
        load_scaler(self._optimizer, state["scaler"])

    def close(self) -> None:
        """Nothing was changed."""

    def _complete_gradients(self) -> None:
        """Every rank of the island has whole gradients again, and all of them count."""
        optimizer = self._optimizer
        if self._groups.inner is not None:
            wholes = optimizer.fp32_groups_gradients_flat
            partitions = optimizer.fp32_groups_gradient_flat_partition
            for whole, partition in zip(wholes, partitions, strict=True):
                comm.all_gather_into_tensor(whole, partition, group=self._groups.inner)
        for number, flags in enumerate(optimizer.fp32_groups_has_gradients):
            optimizer.fp32_groups_has_gradients[number] = [True] * len(flags)

    def _take_norms(self) -> None:
        """Norms and overflow of offloaded gradients, which DeepSpeed notes in backward."""
        for span, gradient in zip(self._spans, self.gradients(), strict=True):
            number = self._optimizer.get_param_id(span.parameter)
            norm = gradient.to(get_norm_dtype()).norm(2)
            self._optimizer.norm_for_param_grads[number] = norm
            if has_inf_or_nan(gradient):
                self._optimizer.local_overflow = True

    def _tensors(self) -> list[torch.Tensor]:
        """This rank's partition of every parameter group."""
        if isinstance(self._optimizer, BF16_Optimizer):
            return list(self._optimizer.fp32_groups_flat_partition)
        return list(self._optimizer.single_partition_of_fp32_groups)

    def _lay_out(self, names: Names) -> Iterator[Span]:
        """Whole parameters in the undivided flat tensors."""
        if isinstance(self._optimizer, BF16_Optimizer):
            for flat, parameters in enumerate(self._optimizer.bf16_groups):
                start = 0
                for parameter in parameters:
                    yield names.span(parameter, flat, start, parameter.numel())
                    start += parameter.numel()
            return
        groups = zip(
            self._optimizer.round_robin_bit16_groups,
            self._optimizer.round_robin_bit16_meta,
            self._optimizer.round_robin_bit16_offsets,
            strict=True,
        )
        for flat, (parameters, metas, starts) in enumerate(groups):
            for parameter, meta, start in zip(parameters, metas, starts, strict=True):
                yield names.span(parameter, flat, start, meta.numel())

    def _parts(self, flat: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Gradients of one partition by their first element in it; made contiguous in place."""
        entries = self._optimizer.averaged_gradients[flat]
        start = 0
        for number, entry in enumerate(entries):
            if not entry.is_contiguous():
                entries[number] = entry.contiguous()
            yield start, entries[number].detach().view(-1)
            start += entry.numel()

    def _muon_comes_first(self) -> bool:
        uses_muon = "muon" in type(self._optimizer.optimizer).__name__.lower()
        return uses_muon and not self._is_offloaded
